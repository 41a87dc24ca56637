"""Does the reward model find the utility it was ranked by? On a task where ceiling and floor are known.

    python -m experiments.reward_exact --seeds=0,1,2 [--json] [--prompts=6000] [--pairs=all|one]

Rankings are drawn from Plackett-Luce, so that the pairs in them are exactly Bradley-Terry's: i comes before j with
probability s = sigmoid(r_i - r_j), and no model can be right more often than E[max(s, 1 - s)] nor have less
cross-entropy than E[-s log s - (1 - s) log(1 - s)]. Per seed, over every pair of completions of every prompt: accuracy
and bayes_accuracy, cross_entropy and floor, slope of the model's margin on the true one, and correlation within
prompts. The bar is accuracy in [Bayes - .02, Bayes], cross-entropy within .02 above the floor, slope in [.8, 1.2].

--pairs=one keeps two completions of each prompt: what a pair a prompt teaches, at far fewer labels.
"""

import time

from absl import flags
from tqdm import tqdm

from experiments.reward_exact.task import Task, TaskConfig, outside_the_bar
from gptjax import command_line, json_files


def main(_):
    for seed in FLAGS.seeds:
        began = time.perf_counter()
        task = Task(seed, TaskConfig(prompts=FLAGS.prompts, pairs=FLAGS.pairs))
        with tqdm(total=task.steps, desc=f"seed {seed}", unit="step", leave=False) as bar:
            params = task.train(record=lambda *_, bar=bar: bar.update())
        result = {"seed": seed, "pairs": FLAGS.pairs, "prompts": FLAGS.prompts, **task.figures(params),
                  "seconds": time.perf_counter() - began}  # fmt: skip
        print(json_files.dumps(result) if FLAGS.json else line(result), flush=True)


def line(r: dict) -> str:
    """One seed's figures for a person."""
    faults = outside_the_bar(r)
    return (
        f"seed {r['seed']}: accuracy {r['accuracy']:.4f} (Bayes {r['bayes_accuracy']:.4f}), cross-entropy "
        f"{r['cross_entropy']:.4f} (floor {r['floor']:.4f}), slope {r['slope']:.3f}, correlation "
        f"{r['correlation']:.3f}; {r['seconds']:.0f} s; {'OUTSIDE THE BAR: ' + ', '.join(faults) if faults else 'ok'}"
    )


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_seeds("0,1,2", "a run for each.")
    flags.DEFINE_integer("prompts", 6000, "Prompts, each with one ranking, seen once.", lower_bound=1)
    flags.DEFINE_enum("pairs", "all", ("all", "one"), "Which pairs of a ranking to learn from.")
    flags.DEFINE_bool("json", False, "One JSON object per seed.")
    command_line.run(main)
