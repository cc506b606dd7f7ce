"""The rate tuned instead of guessed: advice from what is published, a search over runs, and a verdict on fresh seeds."""
