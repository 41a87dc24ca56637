"""Does PPO reach the optimum it is said to have? On a task where the optimum is known.

    python -m experiments.ppo_exact --seeds=0,1,2,3,4 [--json] [--mutation=NAME] [--list_mutations]

Per seed: gap, the share of J* - J_ref that PPO closed (1 is the optimum), and kl_to_optimum, KL(pi || pi*) in nats. The
bar is gap >= .98 and kl_to_optimum <= .05. --mutation plants one of the faults of mutations.py first.
"""

import time

from absl import flags
from tqdm import tqdm

from experiments.ppo_exact import mutations
from gptjax import command_line, json_files


def main(_):
    if FLAGS.list_mutations:
        for name, function in mutations.MUTATIONS.items():
            print(f"{name:<36}{function.__doc__.splitlines()[0]}")
        return
    if FLAGS.mutation:
        mutations.plant(FLAGS.mutation)
    from experiments.ppo_exact.task import Task, TaskConfig  # after the fault is planted

    for seed in FLAGS.seeds:
        began = time.perf_counter()
        task = Task(seed, TaskConfig(iterations=FLAGS.iterations))
        with tqdm(total=FLAGS.iterations, desc=f"seed {seed}", unit="it", leave=False) as bar:
            state = task.train(record=lambda *_, bar=bar: bar.update())
        result = {"seed": seed, **task.figures(state.policy), "seconds": time.perf_counter() - began}
        if FLAGS.mutation:
            result["mutation"] = FLAGS.mutation
        if FLAGS.json:
            print(json_files.dumps(result), flush=True)
        else:
            good = result["gap"] >= 0.98 and result["kl_to_optimum"] <= 0.05
            verdict = "ok" if good else "OUTSIDE THE BAR"
            print(
                f"seed {seed}: gap {result['gap']:.4f}, KL to the optimum {result['kl_to_optimum']:.4f}, "
                f"to the reference {result['kl_to_reference']:.2f}; {result['seconds']:.0f} s; {verdict}"
            )


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_seeds("0,1,2,3,4", "a run for each.")
    flags.DEFINE_integer("iterations", 200, "PPO iterations.", lower_bound=1)
    flags.DEFINE_string("mutation", None, "A fault to plant; see --list_mutations.")
    flags.DEFINE_bool("list_mutations", False, "The faults that can be planted.")
    flags.DEFINE_bool("json", False, "One JSON object per seed.")
    command_line.run(main)
