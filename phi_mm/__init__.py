"""phi-mm: a Phi language model that sees and hears."""
