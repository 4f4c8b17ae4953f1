"""The networks of the paper, built layer by layer: ViT[E H L] (Section 3.4) and MLP[E L] (Section 4).

    B  images in a batch        P  patches (tokens) of an image       E  embedding width
    H  heads, each d = E/H      L  layers                             C, p  channels, side of a patch

A model is a list of local layers, each trained by its own loss; data flows through it as

    h = model.patches(images)              # (B, P, C*p*p)
    for layer in model.layers:
        h = layer(h)                       # (B, P, E)      model.pool(h), (B, E), is normalised for the loss, Eq. 13
    scores = model.head(model.pool(h))     # (B, classes)

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
        qkv = self.qkv(x).view(B, P, 3, H, d).permute(2, 0, 3, 1, 4)
        if x.is_cuda:                   # on a CPU, with 64 tokens, two plain matrix products are faster than the fused call
            h = F.scaled_dot_product_attention(*qkv)                                    # (B, H, P, d), one fused call
        else:
            q, k, v = qkv.reshape(3, B * H, P, d)
            weights = (q / d ** 0.5 @ k.mT).softmax(dim=-1)                             # (B*H, P, P)
            h = (weights @ v).view(B, H, P, d)                                          # softmax(q k^T / sqrt(d)) v
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

    pool: "mean" over the patches (Eq. 13) or "token", the class token's output (Table 5).
    Raises ValueError if heads do not divide E, patches do not divide the image, or for another pool.
    """

    def __init__(self, image_shape, num_classes, embed_dim, num_heads, num_layers, patch_size=4, pool="mean",
                 position_std=1.0):
        super().__init__()
        if pool not in ("mean", "token"):
            raise ValueError(f'pool must be "mean" or "token"; got {pool!r}')
        self.patch_size, self.pooling = patch_size, pool
        _, num_patches, patch_dim = patchify(torch.zeros(1, *image_shape), patch_size).shape
        embedding = PatchEmbedding(patch_dim, num_patches, embed_dim, pool == "token", position_std)
        self.layers = nn.ModuleList(EncoderLayer(embed_dim, num_heads) for _ in range(num_layers))
        self.layers[0] = nn.Sequential(embedding, self.layers[0])
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def patches(self, images):
        """The input of layer 1: (B, C, H, W) -> (B, P, C*p*p)."""
        return patchify(images, self.patch_size)

    def pool(self, h):
        """A layer's output, one vector an image: (B, P, E) -> (B, E). Eq. 13: f_i = 1/P sum_j f_ij."""
        return h.mean(dim=1) if self.pooling == "mean" else h[:, 0]


class MLP(nn.Module):
    """MLP[E L]: L local layers of linear + ReLU on flat pixels (Section 4, Models)."""

    def __init__(self, image_shape, num_classes, embed_dim, num_layers):
        super().__init__()
        widths = [torch.Size(image_shape).numel()] + num_layers * [embed_dim]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, E), nn.ReLU()) for D, E in zip(widths, widths[1:]))
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, num_classes))

    def patches(self, images):
        """The input of layer 1: (B, C, H, W) -> (B, C*H*W)."""
        return images.flatten(1)

    def pool(self, h):
        """(B, E) -> (B, E): one vector an image already."""
        return h


def build_model(name, image_shape, num_classes, patch_size=4, pool="mean", position_std=1.0):
    """A ViT or MLP from its name in the paper's notation, "ViT[128 4 5]" or "MLP[800 4]", or "vit-128-4-5", "mlp-800-4".

    image_shape (C, H, W). patch_size, pool and position_std matter to a ViT alone. Raises ValueError for another name,
    and as `ViT` does.
    """
    match = re.fullmatch(r"(vit|mlp)((?:-[1-9]\d*)+|\[[1-9]\d*(?: [1-9]\d*)+\])", name.lower())
    kind, sizes = (match[1], [int(size) for size in re.findall(r"\d+", match[2])]) if match else ("", [])
    if (kind, len(sizes)) not in (("vit", 3), ("mlp", 2)):
        raise ValueError(f'a model is named "ViT[E H L]" or "vit-E-H-L", "MLP[E L]" or "mlp-E-L"; got {name!r}')
    if kind == "mlp":
        return MLP(image_shape, num_classes, *sizes)
    return ViT(image_shape, num_classes, *sizes, patch_size, pool, position_std)
