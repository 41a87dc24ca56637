"""What the GPU benchmark prints and draws of each part."""

from pathlib import Path


def say(name: str, r: dict):
    """The part's figures in a few lines on stdout."""
    if "left out" in r:
        return print(f"{name}: left out: {r['left out']}")
    kind = name.split()[0]
    if kind == "check":
        for what, c in r["checks"].items():
            print(f"  {'right' if c['right'] else 'WRONG':<6}{what}: {c['value']:.3g} (bound {c['bound']:g})")
    elif kind == "train":
        used = " (no MFU: this device's peak is not known)"
        if r["mfu_palm"] is not None:
            used = f", MFU {r['mfu_palm']:.1%} (PaLM's), {r['mfu_causal']:.1%} with attention halved"
        print(f"{name}: {r['tokens_per_second']:,.0f} tokens/s{used}; {r['rows']} rows, remat {r['remat']}{_ratio(r)}")
    elif kind == "decode":
        for batch, of in r.items():
            if batch.startswith("batch"):
                share = f", {of['share_of_bound']:.0%} of the bound" if of["share_of_bound"] else ""
                print(f"{name}, {batch}: {of['tokens_per_second']:,.0f} tokens/s{share}{_ratio(of)}")
    elif kind == "ppo":
        parts = ", ".join(f"{k} {r[k][1]:.2f} s" for k in ("rollout", "score", "update"))
        print(f"{name}: {r['samples_per_second']:.1f} episodes/s ({parts})")
    else:
        for what, of in r.items():
            if isinstance(of, dict) and "own" in of:
                print(f"{r['own']}, {what}: {of['own']['ms_quartiles'][1]:.2f} ms, {of['times_xla']:.2f}x XLA's")


def _ratio(r: dict) -> str:
    if "ratio_quartiles" not in r:
        return ""
    low, middle, high = r["ratio_quartiles"]
    return f"; {middle:.2f}x torch (quartiles {low:.2f}-{high:.2f})"


def ratios(results: dict) -> list[tuple[str, list[float]]]:
    """(what, quartiles of the ratio) beside torch, and of attention beside XLA's (a median alone)."""
    found = []
    for name, r in results.items():
        if not isinstance(r, dict) or "left out" in r:
            continue
        if "ratio_quartiles" in r:
            found.append((f"{name}\nbeside torch", r["ratio_quartiles"]))
        for what, of in r.items():
            if isinstance(of, dict) and "ratio_quartiles" in of:
                found.append((f"{name}, {what}\nbeside torch", of["ratio_quartiles"]))
            if isinstance(of, dict) and "times_xla" in of:
                found.append((f"attention, {what}\nbeside XLA's", [of["times_xla"]] * 3))
    return found


def shares(results: dict) -> list[tuple[str, float]]:
    """(what, share of what the chip could do): MFU of training, bandwidth of decoding."""
    found = []
    for name, r in results.items():
        if not isinstance(r, dict) or "left out" in r:
            continue
        if r.get("mfu_palm") is not None:
            found.append((f"{name}\nMFU", r["mfu_palm"]))
        for what, of in r.items():
            if isinstance(of, dict) and of.get("share_of_bound") is not None:
                found.append((f"{name}, {what}\nof the bandwidth", of["share_of_bound"]))
    return found


def plot(results: dict, path: Path):
    """Two panels: times as fast as the peer, and the share of the chip's own limit. None if there is nothing yet."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left, right = ratios(results)[::-1], shares(results)[::-1]
    if not left and not right:
        return
    height = 0.8 + 0.42 * max(len(left), len(right))
    figure, (beside, of_chip) = plt.subplots(1, 2, figsize=(13, height), constrained_layout=True)
    for i, (_, (low, middle, high)) in enumerate(left):
        beside.barh(i, middle, color="#3b6fb6" if middle >= 1 else "#d1495b", height=0.6)
        beside.errorbar(middle, i, xerr=[[middle - low], [high - middle]], color="black", capsize=3, lw=1)
        beside.text(high, i, f" {middle:.2f}×", va="center", fontsize=8)
    beside.axvline(1, color="gray", lw=1)
    beside.set_xlabel("times as fast as the peer; whiskers: quartiles over rounds", fontsize=8)
    for i, (_, share) in enumerate(right):
        of_chip.barh(i, share, color="#3b6fb6", height=0.6)
        of_chip.text(share, i, f" {share:.0%}", va="center", fontsize=8)
    of_chip.set_xlim(0, 1)
    of_chip.set_xlabel("share of what the data sheet allows", fontsize=8)
    for axis, rows in ((beside, left), (of_chip, right)):
        axis.set_yticks(range(len(rows)), [what for what, _ in rows], fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
