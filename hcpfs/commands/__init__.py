"""The commands, one module each, and what they have in common: options for click, sentences, the status of a mount."""
