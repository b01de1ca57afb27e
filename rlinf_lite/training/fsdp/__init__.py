"""The FSDP backend: models sharded over dimension 0 (FSDP1: in flat slices), trained on forests of segments."""
