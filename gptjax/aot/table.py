"""What `python -m gptjax.aot` prints."""

from gptjax.aot.check import describe_mesh


def gib(n) -> str:
    return "?" if n is None else f"{n / 2**30:,.2f} GiB"


def table(r: dict) -> str:
    """The result of check.check as a text table."""
    per = "chip" if r["chips"] == r["devices"] else "device (half a chip)"
    rows = [("slice", f"{r['topology']}, {r['chips']:,} chips, mesh {describe_mesh(r['mesh'])}")]
    if r["adjusted"]:
        rows.append(("adjusted", " ".join(f"--config.{k}={v}" for k, v in r["adjusted"].items())))
    if not r["fits"]:
        rows += [("fits", f"NO: {r['message']}"), ("largest per " + per, "")]
        rows += [(f"  {gib(b['bytes'])}", f"{b['what']} {b['shape']}") for b in r["largest"][:12]]
        if remedy := r.get("remedy"):
            flags_ = " ".join(f"--config.{k}={v}" for k, v in remedy["changes"].items())
            rows.append(("compiles with", f"--topology={remedy['topology']} {flags_}: {gib(remedy['bytes_per_chip'])}"))
        elif "remedy" in r:
            rows.append(("remedy", "none found on slices of this generation: try mesh.tensor, or larger chips"))
        return "\n".join(f"{name:<24}{value}" for name, value in rows)
    b = r["bounds"]
    rows += [
        ("fits", f"yes: {gib(r['bytes_per_chip'])} of {gib(r['hbm_per_chip'])} per {per}"),
        ("  arguments", gib(r["argument_bytes_per_chip"])),
        ("  temporaries", gib(r["temporary_bytes_per_chip"])),
        *((("  in host memory", gib(r["host_bytes_per_chip"])),) if r["host_bytes_per_chip"] else ()),
        ("our own count", f"{gib(sum(r['ours_per_chip'].values()))}"),
        *((f"  {gib(v)}", k) for k, v in r["ours_per_chip"].items()),
        ("FLOPs per " + per, f"{r['flops_per_chip']:.4g}"),
        ("sent per " + per, gib(r["collective_bytes_per_chip"])),
    ]
    rows += [(f"  {k}", f"{v['executions']:,} x, {gib(v['bytes'])}") for k, v in r["collectives"].items()]
    rows += [
        ("at least", ", ".join(f"{k} {v:.4g} s" for k, v in b["seconds"].items() if v is not None)
                     + f": {b['binding']} bounds it"),
        ("intensity", f"{b['flops_per_hbm_byte']:,.0f} FLOPs per HBM byte"),
    ]  # fmt: skip
    if b["mfu_bound"]:
        rows.append(
            (
                "MFU, PaLM's",
                f"at most {b['mfu_bound']:.1%} ({b['mfu_bound_causal']:.1%} with attention halved); "
                f"{b['mfu_without_overlap']:.1%} if nothing overlaps",
            )
        )
    if r["loops_of_unknown_length"]:
        rows.append(("counted once", f"loops of unknown length: {', '.join(r['loops_of_unknown_length'])}"))
    rows.append(("compiled in", f"{r['compile_seconds']:.0f} s"))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)
