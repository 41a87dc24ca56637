"""Rewards that the processes of test_hosts_runs.py import by name."""


def shortness(prompts, responses):
    """A reward on texts that must be called once with the whole batch: it depends on the other responses."""
    lengths = [len(response) for response in responses]
    return [max(lengths) - length + 0.1 * (length == min(lengths)) for length in lengths]


def no_number(prompts, responses):
    return [float("nan")] * len(responses)
