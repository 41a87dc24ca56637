"""The peer on the same chip: a GPT in plain torch with scaled_dot_product_attention, torch.compile, and fused AdamW.

Started by the benchmark: python torch_peer.py SHAPE.json. It needs torch alone. A line `train ROWS STEPS` or
`decode ROWS PROMPT NEW` is answered with the seconds of one step, or of one text of each row. On a CPU (--tiny)
nothing is compiled.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.c_attn, self.c_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.c_fc, self.mlp_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x, cache=None, at=None, mask=None):
        """cache: (k, v) [batch, head, slot, width], written at slots `at`; mask: bool [query, slot]."""
        b, t, d = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            for whole, new in zip(cache, (k, v), strict=True):
                whole.index_copy_(2, at, new)
            y = F.scaled_dot_product_attention(q, *cache, attn_mask=mask)
        x = x + self.c_proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab_size, n_layer, n_head, d_model, context_length):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, d_model), nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(d_model)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids, caches=None, at=None, mask=None):
        """[batch, time] -> hidden states after the last LayerNorm."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device) if at is None else at)
        for i, block in enumerate(self.blocks):
            x = block(x, caches and caches[i], at, mask)
        return self.ln_f(x)

    def loss(self, tokens):
        logits = F.linear(self(tokens[:, :-1]), self.wte.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def synchronized() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


class Training:
    def __init__(self, shape):
        self.shape, self.model = shape, GPT(**shape).to(DEVICE)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=CUDA
        )
        self.loss = torch.compile(self.model.loss) if CUDA else self.model.loss
        self.warm = set()

    def step(self, tokens):
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, DTYPE):
            loss = self.loss(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def __call__(self, rows, steps):
        tokens = torch.randint(self.shape["vocab_size"], (rows, self.shape["context_length"] + 1), device=DEVICE)
        for _ in range(0 if rows in self.warm else 3):
            self.step(tokens)
        self.warm.add(rows)
        began = synchronized()
        for _ in range(steps):
            self.step(tokens)
        return (synchronized() - began) / steps


class Decoding:
    """Greedy over a cache of fixed size, a token's step as one CUDA graph (torch.compile, reduce-overhead)."""

    def __init__(self, shape):
        self.shape, self.model = shape, GPT(**shape).to(DEVICE, DTYPE).eval()
        self.caches = {}
        self.one = torch.compile(self.token, mode="reduce-overhead", fullgraph=True) if CUDA else self.token

    def token(self, ids, caches, at, slots):
        x = self.model(ids, caches, at, slots[None] <= at[:, None])
        return F.linear(x[:, -1], self.model.wte.weight).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def __call__(self, rows, prompt, new):
        s, (heads, width) = self.shape, (self.shape["n_head"], self.shape["d_model"] // self.shape["n_head"])
        ids = torch.randint(s["vocab_size"], (rows, prompt), device=DEVICE)
        slots = torch.arange(prompt + new, device=DEVICE)
        if (key := (rows, prompt + new)) not in self.caches:
            zeros = lambda: torch.zeros(rows, heads, prompt + new, width, dtype=DTYPE, device=DEVICE)
            self.caches[key] = [(zeros(), zeros()) for _ in range(s["n_layer"])]
            for tensor in sum(map(list, self.caches[key]), []):
                torch._dynamo.mark_static_address(tensor)  # or what a step writes to would be kept out of its graph
        cache = self.caches[key]
        began = synchronized()
        out = [self.token(ids, cache, slots[:prompt], slots)]
        for i in range(prompt, prompt + new - 1):
            out.append(self.one(out[-1], cache, slots[i : i + 1], slots).clone())
        torch.cat(out, 1).tolist()
        return synchronized() - began


def main():
    torch.set_float32_matmul_precision("high")
    if not CUDA:
        torch.set_num_threads(1)  # at toy size threads wait for one another
    shape, works = json.loads(sys.argv[1]), {}
    where = torch.cuda.get_device_name() if CUDA else "CPU, not compiled"
    print(json.dumps(f"torch {torch.__version__}, {'torch.compile, ' if CUDA else ''}SDPA, {where}"), flush=True)
    for line in sys.stdin:
        kind, *numbers = line.split()
        if kind not in works:
            works[kind] = {"train": Training, "decode": Decoding}[kind](shape)
        print(json.dumps({"of_one": works[kind](*map(int, numbers))}), flush=True)


if __name__ == "__main__":
    main()
