"""What answers: loading, memory, prompts with their media, generation, and the queue before it."""
