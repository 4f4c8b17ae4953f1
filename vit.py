"""The networks of the paper, layer by layer: ViT[E H L] (Section 3.4) and MLP[E L] (Section 4).

    B  images in a batch            #P  patches of an image, each of D/#P numbers
    E  embedding width              T   tokens: patches, a label patch if used (a class token: + 1)
    H  heads, each of width E/H     D   numbers in an image: channels * height * width
    L  layers                       C   channels in shapes of images, else classes

A model is a list of layers. CFF and FF train each by its own loss. Data flows through it as

    h = model.patches(images)              # (B, T, D/#P)
    for layer in model.layers:
        h = layer(h)                       # (B, T, E)     the loss of the layer sees model.pool(h)
    scores = model.head(model.pool(h))     # (B, classes)

An MLP has one vector per image instead of tokens: (B, D), then (B, E). FF, SymBa and FF Collab need
a model built with `labels`. It takes images and labels, model.patches(images, y), and the output of
each layer is normalised before the next layer (see cff.encode).

    >>> model = build_model("ViT[128 4 5]", image_shape=(3, 32, 32), num_classes=10)
"""
import re

import torch
from torch import nn
from torch.nn import functional as F


def patchify(images, patch_size):
    """Cut images (B, C, height, width) into flat patches (B, #P, D/#P), row by row.
    Raises ValueError if height or width is not a multiple of patch_size."""
    B, C, height, width = images.shape
    p = patch_size
    if p < 1 or height % p or width % p:
        raise ValueError(f"patches of {p} x {p} do not divide an image of {height} x {width}")
    patches = images.reshape(B, C, height // p, p, width // p, p)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


# --------------------------------------------------------------------------- the encoder layer

class Attention(nn.Module):
    """Multi-head self-attention (MSA in Section 3.4): (B, T, E) -> (B, T, E).

    Raises ValueError if E is not a multiple of H.
    """

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide an embedding of width {embed_dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.qkv.weight)        # initialised as in nn.MultiheadAttention
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        B, T, E = x.shape
        H, d = self.num_heads, E // self.num_heads
        qkv = self.qkv(x).view(B, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                # (B, H, T, d) each
        scores = (q / d ** 0.5) @ k.transpose(2, 3)         # q k^T / sqrt(d), (B, H, T, T)
        h = scores.softmax(dim=3) @ v                       # softmax(q k^T / sqrt(d)) v
        return self.out(h.transpose(1, 2).reshape(B, T, E))


class EncoderLayer(nn.Module):
    """One pre-norm encoder layer of Section 3.4, without dropout: (B, T, E) -> (B, T, E).

    Its initialisation and output are those of torch.nn.TransformerEncoderLayer(E, H, 2 * E,
    dropout=0, activation="gelu", norm_first=True, batch_first=True).
    """

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = Attention(embed_dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(embed_dim, 2 * embed_dim), nn.GELU(),
                                 nn.Linear(2 * embed_dim, embed_dim))

    def forward(self, x):
        z = self.attention(self.norm1(x)) + x                   # z = MSA(LN(x)) + x
        return self.mlp(self.norm2(z)) + z                      # f = MLP(LN(z)) + z


# ------------------------------------------------------------------------------------ the models

class PatchEmbedding(nn.Module):
    """The first part of layer 1, before its encoder layer: (B, T, D/#P) -> (B, T, E).

    It has a linear projection, ReLU and a learnable position per token. Positions start at random,
    with standard deviation position_std. class_token=True adds a token in front: T + 1.
    """

    def __init__(self, patch_dim, num_tokens, embed_dim, class_token, position_std):
        super().__init__()
        self.projection = nn.Linear(patch_dim, embed_dim)
        self.token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        position = torch.randn(1, num_tokens + class_token, embed_dim)
        self.position = nn.Parameter(position_std * position)

    def forward(self, x):
        x = F.relu(self.projection(x))
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), 1, -1), x], dim=1)
        return x + self.position                                # MLP_proj(x) + E_pos


class ViT(nn.Module):
    """ViT[E H L]: L local layers; the first includes projection and positions (Section 3.4).

    pool is "mean", over the tokens (Eq. 13), or "token", the class token's output (Table 5). labels
    is None, or "patch": a random, fixed label patch per class comes first (Algorithm 1, right).
    Raises ValueError for another pool or labels, and as `patchify` and `Attention` do.
    """

    def __init__(self, image_shape, num_classes, embed_dim, num_heads, num_layers, labels=None,
                 patch_size=4, pool="mean", position_std=1.0):
        super().__init__()
        if pool not in ("mean", "token"):
            raise ValueError(f'pool must be "mean" or "token"; got {pool!r}')
        if labels not in (None, "patch"):
            raise ValueError(f'labels of a ViT must be None or "patch"; got {labels!r}')
        self.num_classes, self.patch_size, self.pooling = num_classes, patch_size, pool
        _, num_tokens, patch_dim = patchify(torch.zeros(1, *image_shape), patch_size).shape
        self.register_buffer("labels", None)
        if labels:
            table = torch.randn(num_classes, patch_dim)
            self.labels = F.pad(table, (0, 0, 0, 1))    # row -1 is zeros, the neutral label
            num_tokens += 1
        embedding = PatchEmbedding(patch_dim, num_tokens, embed_dim, pool == "token", position_std)
        first, *others = [EncoderLayer(embed_dim, num_heads) for _ in range(num_layers)]
        self.layers = nn.ModuleList([nn.Sequential(embedding, first), *others])
        self.head = linear_head(embed_dim, num_layers, num_classes, labels)

    def patches(self, images, y=None):
        """The input of layer 1: (B, C, height, width) -> (B, T, D/#P), y's label patch first."""
        x, label = patchify(images, self.patch_size), label_rows(self.labels, y)
        return x if y is None else torch.cat([label[:, None], x], dim=1)

    def pool(self, h):
        """One vector per image, (B, T, E) -> (B, E): 1/T sum_j f_ij (Eq. 13) or the class token."""
        return h.mean(dim=1) if self.pooling == "mean" else h[:, 0]


class MLP(nn.Module):
    """MLP[E L]: L local layers of linear + ReLU on flat pixels (Section 4, Models).

    labels is None; "one-hot": the label replaces the first pixels (FF and FF Collab, Fig. 2b); or
    "random": a random, fixed vector of D numbers per class follows the pixels (SymBa, Fig. 2c and
    Eq. 4). Raises ValueError for other labels, and for more one-hot classes than D.
    """

    def __init__(self, image_shape, num_classes, embed_dim, num_layers, labels=None):
        super().__init__()
        D = torch.Size(image_shape).numel()
        if labels not in (None, "one-hot", "random"):
            raise ValueError(f'MLP labels must be None, "one-hot" or "random"; got {labels!r}')
        if labels == "one-hot" and num_classes > D:
            raise ValueError(f"{num_classes} classes do not fit into an image of {D} numbers")
        self.num_classes, self.one_hot = num_classes, labels == "one-hot"
        self.register_buffer("labels", None)
        if labels:
            table = torch.eye(num_classes) if self.one_hot else torch.randn(num_classes, D)
            table = (D / num_classes) ** 0.5 * F.normalize(table)   # images have norm ~ sqrt(D)
            self.labels = F.pad(table, (0, 0, 0, 1))    # row -1 is zeros, the neutral label
        self.layers, width = nn.ModuleList(), 2 * D if labels == "random" else D
        for _ in range(num_layers):
            self.layers.append(nn.Sequential(nn.Linear(width, embed_dim), nn.ReLU()))
            width = embed_dim
        if labels:      # n inputs have norm 1, not sqrt(n), so weights start sqrt(n) times larger
            for layer in self.layers:
                nn.init.uniform_(layer[0].weight, -1, 1)
        self.head = linear_head(embed_dim, num_layers, num_classes, labels)

    def patches(self, images, y=None):
        """The input of layer 1: (B, D). With labels y its rows have norm 1; SymBa has (B, 2D)."""
        x, label = images.flatten(1), label_rows(self.labels, y)
        if y is None:
            return x
        joined = [label, x[:, label.shape[1]:]] if self.one_hot else [x, label]
        return F.normalize(torch.cat(joined, dim=1))

    def pool(self, h):
        """h itself, (B, E): an MLP already has one vector per image."""
        return h


def label_rows(table, y):
    """The rows of a label table for labels y (B,); None if both are None. y = -1 selects the last
    row, the neutral label. Raises ValueError if only one is None, and for a label outside -1..C-1
    (not on a GPU, because the check would make the CPU wait for it)."""
    if (table is None) != (y is None):
        raise ValueError("a model built without labels takes only images; a model built with "
                         "labels takes images and y (-1: the neutral label)")
    if y is None:
        return None
    C = len(table) - 1
    if y.device.type == "cpu" and not ((y >= -1) & (y < C)).all():
        raise ValueError(f"labels must be 0..{C - 1}, or -1 for neutral; got {y.min()}..{y.max()}")
    return table[y]


def linear_head(embed_dim, num_layers, num_classes, labels):
    """LayerNorm + linear, on the last layer's output; with labels, on all but the first layer's."""
    width = embed_dim * max(1, num_layers - 1) if labels else embed_dim         # Table 2
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))


def plain_name(name):
    """The name of a model as used for folders and tables: "ViT[128 4 5]" -> "vit-128-4-5"."""
    return re.sub(r"\[([\d ]+)\]$", r"-\1", name.lower()).replace(" ", "-")


def build_model(name, image_shape, num_classes, labels=None, **options):
    """Build a model from its name: "ViT[128 4 5]" or "vit-128-4-5", "MLP[800 4]" or "mlp-800-4".

    image_shape is (channels, height, width). labels and options are arguments of `ViT` or `MLP`.
    Raises ValueError for any other name, and as these two classes do.
    """
    kind, *sizes = plain_name(name).split("-")
    if not re.fullmatch(r"vit(-[1-9]\d*){3}|mlp(-[1-9]\d*){2}", plain_name(name)):
        raise ValueError('a model is named "ViT[E H L]" or "vit-E-H-L", "MLP[E L]" or "mlp-E-L"; '
                         f"got {name!r}")
    model = ViT if kind == "vit" else MLP
    return model(image_shape, num_classes, *map(int, sizes), labels=labels, **options)
