"""Train the policy on one rank: log-probs, loss, optimizer step, state."""
