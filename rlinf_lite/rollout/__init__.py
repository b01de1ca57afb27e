"""Generate responses: the engine protocol, the builtin engine and vLLM, and how prompts are split into batches."""
