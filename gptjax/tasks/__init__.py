"""Zero- and few-shot evaluation."""
