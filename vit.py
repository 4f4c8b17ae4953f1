"""The networks of the paper, built layer by layer: ViT[E H L] (Section 3.4) and MLP[E L] (Section 4).

    B  images in a batch        P  patches (tokens) of an image       E  embedding width
    H  heads, each d = E/H      L  layers                             C, p  channels, side of a patch
                                                                      (H, W of an image: its height and width)

A model is a list of local layers, each trained by its own loss; data flows through it as

    h = model.patches(images)              # (B, P, C*p*p)
    for layer in model.layers:
        h = layer(h)                       # (B, P, E)      model.pool(h), (B, E), is normalised for the loss, Eq. 13
    scores = model.head(model.pool(h))     # (B, classes)

An MLP has one vector an image, (B, D), then (B, E), in the place of patches. Models for FF, SymBa and Collab are built with
`labels` and get the label with the image: model.patches(images, y); how they go on is in `cff.encode` and `cff.features`.

    >>> model = build_model("ViT[128 4 5]", image_shape=(3, 32, 32), num_classes=10)
"""
import re

import torch
from torch import nn
from torch.nn import functional as F


def patchify(images, patch_size):
    """Cut images (B, C, H, W) into flat patches (B, P, C*p*p), row by row; ValueError if they do not divide the image."""
    B, C, H, W = images.shape
    p = patch_size
    if p < 1 or H % p or W % p:
        raise ValueError(f"patches of {p} x {p} do not divide an image of {H} x {W}")
    patches = images.reshape(B, C, H // p, p, W // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


# ------------------------------------------------------------------------------------------------- the encoder layer

class Attention(nn.Module):
    """Multi-head self-attention, MSA of Section 3.4: (B, P, E) -> (B, P, E). Raises ValueError if H does not divide E."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide an embedding of width {embed_dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x):
        B, P, E = x.shape
        H, d = self.num_heads, E // self.num_heads
        q, k, v = self.qkv(x).view(B, P, 3, H, d).permute(2, 0, 3, 1, 4)                # (B, H, P, d) each
        if x.is_cuda:
            h = F.scaled_dot_product_attention(q, k, v)                                 # the formula below in one fused call
        else:                           # faster on a CPU
            h = (q / d ** 0.5 @ k.mT).softmax(dim=-1) @ v                               # softmax(q k^T / sqrt(d)) v
        return self.out(h.transpose(1, 2).reshape(B, P, E))


class EncoderLayer(nn.Module):
    """One pre-norm encoder layer of Section 3.4, without dropout: (B, P, E) -> (B, P, E).

    Equal to torch.nn.TransformerEncoderLayer(E, H, 2 * E, dropout=0, activation="gelu", norm_first=True, batch_first=True).
    """

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, x):
        z = self.attention(self.norm1(x)) + x                                           # z = MSA(LN(x)) + x
        return self.mlp(self.norm2(z)) + z                                              # f = MLP(LN(z)) + z


# ----------------------------------------------------------------------------------------------- labels as inputs (Fig. 2)

def label_table(num_classes, size, one_hot=False):
    """What stands for each class at the input, (classes + 1, size): one-hot (Fig. 2b) or random and fixed (Fig. 2c).

    The last row, which y = -1 finds, is the neutral label: zeros.
    """
    table = torch.eye(num_classes, size) if one_hot else torch.randn(num_classes, size)
    return torch.cat([table, torch.zeros(1, size)])


def label_rows(labels, y):
    """Rows of the model's label table for labels y (B,), None for none; ValueError if the model needs y, or has no table."""
    if (labels is None) != (y is None):
        raise ValueError("this model was built without labels: it takes images alone" if labels is None else
                         "this model was built with labels: it takes images and y, -1 for the neutral label")
    return None if y is None else labels[y]


# -------------------------------------------------------------------------------------------------------- the models

class PatchEmbedding(nn.Module):
    """What comes before the first encoder layer and trains with it: (B, P, C*p*p) -> (B, P, E), P + 1 with a class token.

    Linear projection, ReLU and a learnable position for each token, started at N(0, position_std).
    """

    def __init__(self, patch_dim, num_patches, embed_dim, class_token, position_std):
        super().__init__()
        self.projection = nn.Linear(patch_dim, embed_dim)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.position = nn.Parameter(position_std * torch.randn(1, num_patches + class_token, embed_dim))

    def forward(self, x):
        x = F.relu(self.projection(x))
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
        return x + self.position                                                        # MLP_proj(x) + E_pos


class ViT(nn.Module):
    """ViT[E H L]: L local layers, the first with projection and position inside (Section 3.4).

    pool: "mean" over the tokens (Eq. 13) or "token", the class token's output (Table 5). labels: None, or for FF, SymBa
    and Collab any other value: a random, fixed label patch for each class stands before the image's (Algorithm 1, right).
    Raises ValueError if heads do not divide E, patches do not divide the image, or for another pool.
    """

    def __init__(self, image_shape, num_classes, embed_dim, num_heads, num_layers, patch_size=4, pool="mean",
                 position_std=1.0, labels=None):
        super().__init__()
        if pool not in ("mean", "token"):
            raise ValueError(f'pool must be "mean" or "token"; got {pool!r}')
        self.patch_size, self.pooling = patch_size, pool
        _, num_patches, patch_dim = patchify(torch.zeros(1, *image_shape), patch_size).shape
        self.register_buffer("labels", label_table(num_classes, patch_dim) if labels else None)
        embedding = PatchEmbedding(patch_dim, num_patches + bool(labels), embed_dim, pool == "token", position_std)
        self.layers = nn.ModuleList(EncoderLayer(embed_dim, num_heads) for _ in range(num_layers))
        self.layers[0] = nn.Sequential(embedding, self.layers[0])
        self.head = linear_head(embed_dim, num_layers, num_classes, labels)

    def patches(self, images, y=None):
        """The input of layer 1: (B, C, H, W) -> (B, P, C*p*p); with the label patch of y in front (B, P + 1, C*p*p)."""
        x, label = patchify(images, self.patch_size), label_rows(self.labels, y)
        return x if y is None else torch.cat([label[:, None], x], dim=1)

    def pool(self, h):
        """A layer's output, one vector an image: (B, P, E) -> (B, E). Eq. 13: f_i = 1/P sum_j f_ij."""
        return h.mean(dim=1) if self.pooling == "mean" else h[:, 0]


class MLP(nn.Module):
    """MLP[E L]: L local layers of linear + ReLU on flat pixels, D = C*H*W (Section 4, Models).

    labels: None; "one-hot": the label of y replaces the first pixels (FF and Collab, Fig. 2b); "random": a random, fixed
    vector of D numbers for each class follows the pixels (SymBa, Fig. 2c and Eq. 4). Either is sqrt(D/classes) long.
    Raises ValueError for more classes than D.
    """

    def __init__(self, image_shape, num_classes, embed_dim, num_layers, labels=None):
        super().__init__()
        D = torch.Size(image_shape).numel()
        if num_classes > D:
            raise ValueError(f"{num_classes} classes do not fit into the first pixels of an image of {D}")
        self.one_hot = labels == "one-hot"
        size = num_classes if self.one_hot else D
        length = (D / num_classes) ** 0.5                   # an image is about sqrt(D) long: neither should drown the other
        self.register_buffer("labels", length * F.normalize(label_table(num_classes, size, self.one_hot)) if labels else None)
        widths = [2 * D if labels == "random" else D] + num_layers * [embed_dim]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(*sizes), nn.ReLU()) for sizes in zip(widths, widths[1:]))
        if labels:                      # PyTorch's U(-1/sqrt(n), 1/sqrt(n)) expects n inputs of variance 1; these have length 1
            for layer in self.layers:
                nn.init.uniform_(layer[0].weight, -1, 1)
        self.head = linear_head(embed_dim, num_layers, num_classes, labels)

    def patches(self, images, y=None):
        """The input of layer 1: (B, C, H, W) -> (B, D); with labels y normalised to length 1, (B, D) or SymBa's (B, 2D)."""
        x, label = images.flatten(1), label_rows(self.labels, y)
        if y is None:
            return x
        return F.normalize(torch.cat([label, x[:, label.shape[1]:]] if self.one_hot else [x, label], dim=1))

    def pool(self, h):
        """(B, E) -> (B, E): one vector an image already."""
        return h


def linear_head(embed_dim, num_layers, num_classes, labels):
    """LayerNorm + linear on the last layer's output; with labels on those of all layers but the first, if there are more (Table 2)."""
    width = embed_dim * max(1, num_layers - 1) if labels else embed_dim
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))


def build_model(name, image_shape, num_classes, patch_size=4, pool="mean", position_std=1.0, labels=None):
    """A ViT or MLP from its name in the paper's notation, "ViT[128 4 5]" or "MLP[800 4]", or "vit-128-4-5", "mlp-800-4".

    image_shape (C, H, W). patch_size, pool and position_std matter to a ViT alone. labels: None (CFF, SCL, BP), "one-hot"
    (FF, Collab) or "random" (SymBa), how images carry labels; on a ViT both are random patches. Raises ValueError for
    another name or another kind of labels, and as `ViT` and `MLP` do.
    """
    match = re.fullmatch(r"(vit|mlp)((?:-[1-9]\d*)+|\[[1-9]\d*(?: [1-9]\d*)+\])", name.lower())
    kind, sizes = (match[1], [int(size) for size in re.findall(r"\d+", match[2])]) if match else ("", [])
    if (kind, len(sizes)) not in (("vit", 3), ("mlp", 2)):
        raise ValueError(f'a model is named "ViT[E H L]" or "vit-E-H-L", "MLP[E L]" or "mlp-E-L"; got {name!r}')
    if labels not in (None, "one-hot", "random"):
        raise ValueError(f'labels must be None, "one-hot" or "random"; got {labels!r}')
    if kind == "mlp":
        return MLP(image_shape, num_classes, *sizes, labels)
    return ViT(image_shape, num_classes, *sizes, patch_size, pool, position_std, labels)
