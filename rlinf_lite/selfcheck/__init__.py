"""The self-check: does this hardware repeat the bits of engine and update, and do both compute the same log-probs?"""
