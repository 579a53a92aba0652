"""Text from a model: answers to prompts, a chat, and data sets made of a teacher's answers."""

from mlx_posttrain.generation.answer import answer, chat, template_for

__all__ = ["answer", "chat", "template_for"]
