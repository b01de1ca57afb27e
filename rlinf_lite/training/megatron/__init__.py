"""The trainer over Megatron-core: tensor parallelism for the model, a ZeRO-1 optimizer of our own in its layout."""
