"""Prompts as users may give them."""

from typing import NotRequired, TypedDict

__all__ = ["ExplicitEncoderDecoderPrompt", "PromptType", "TextPrompt", "TokensPrompt"]


class TextPrompt(TypedDict):
    """A prompt to tokenise. ``cache_salt`` keeps its prefix-cache entries apart from others'."""

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt given as token ids; ``prompt`` is its text where known."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


class ExplicitEncoderDecoderPrompt(TypedDict):
    """What the encoder reads, and what the decoder's output begins with: None for the model's own
    start. Any other prompt is the encoder's, where a model has one.
    """

    encoder_prompt: str | list[int] | TextPrompt | TokensPrompt
    decoder_prompt: NotRequired[str | list[int] | TextPrompt | TokensPrompt | None]


PromptType = str | list[int] | TextPrompt | TokensPrompt | ExplicitEncoderDecoderPrompt
