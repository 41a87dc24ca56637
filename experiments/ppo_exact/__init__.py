"""PPO held against a closed-form optimum, and the faults that the tests must notice."""
