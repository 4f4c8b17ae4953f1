"""The answer of task11, for a layer of task09's parts; in training `vit.LocalLossLayer` does it."""
from torch.nn import functional as F

from vit import Attention


def pooled_output(layer, x):
    """The mean over tokens of an encoder layer's output, (B, T, E) -> (B, E), by less work.

    x has no gradient. layer: .norm1, .norm2; .attention with .qkv, .out, .num_heads; .mlp, as in
    EncoderLayer; it cannot be called. Its parameters get the gradients of the plain way.
    """
    qkv, norm, (first, gelu, second) = layer.attention.qkv, layer.norm1, layer.mlp
    # LN(x) W^T + b = x_hat (W diag(g))^T + (b + W beta)
    x_hat = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    projected = F.linear(x_hat, qkv.weight * norm.weight, qkv.bias + qkv.weight @ norm.bias)
    z = Attention.attend(layer.attention, projected) + x
    u = gelu(first(layer.norm2(z)))
    # pool(W2 u + b2 + z) = W2 pool(u) + b2 + pool(z)
    return second(u.mean(dim=1)) + z.mean(dim=1)
