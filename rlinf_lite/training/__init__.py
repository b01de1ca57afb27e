"""The policy on one rank: log-probs, update, state."""
