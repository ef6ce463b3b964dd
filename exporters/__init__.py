"""From a Hugging Face causal LM to a DASH bundle. Needs the `[export]` extra."""
