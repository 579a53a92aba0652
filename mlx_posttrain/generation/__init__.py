"""Text from a model: answers to prompts, a chat, and data sets made of a teacher's answers."""
