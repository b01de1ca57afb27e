"""Checkpoints and Hugging Face directories converted into each other: the code behind toolkits/ckpt_convertor/."""
