"""The answer to task11: a layer's pooled output, computed with fewer operations."""
from torch.nn import functional as F


def pooled_output(layer, x):
    """The mean over tokens of an encoder layer's output, (B, T, E) -> (B, E), with less work.

    `layer` has the parts of EncoderLayer: norm1, attention (qkv, out, num_heads), norm2 and mlp. It
    cannot be called. Its parameters get the same gradients as in EncoderLayer; x gets none.
    """
    B, T, E = x.shape
    H, d = layer.attention.num_heads, E // layer.attention.num_heads
    qkv, norm, (first, gelu, second) = layer.attention.qkv, layer.norm1, layer.mlp
    # LN(x) W^T + b = x_hat (W diag(g))^T + (b + W beta)
    x_hat = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    projected = F.linear(x_hat, qkv.weight * norm.weight, qkv.bias + qkv.weight @ norm.bias)
    q, k, v = projected.view(B, T, 3, H, d).permute(2, 0, 3, 1, 4)              # (B, H, T, d)
    h = (q / d ** 0.5 @ k.mT).softmax(dim=-1) @ v
    z = layer.attention.out(h.transpose(1, 2).reshape(B, T, E)) + x
    u = gelu(first(layer.norm2(z)))
    # pool(W2 u + b2 + z) = W2 pool(u) + b2 + pool(z)
    return second(u.mean(dim=1)) + z.mean(dim=1)
