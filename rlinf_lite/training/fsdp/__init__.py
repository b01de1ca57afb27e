"""The FSDP2 backend: models sharded over dimension 0, trained on forests of segments."""
