"""Which models are served, and under which names."""

import time

from vllm.config.model import ModelConfig
from vllm.entrypoints.openai.errors import APIError
from vllm.entrypoints.openai.protocol import ModelCard, ModelList

__all__ = ["OpenAIServingModels"]


class OpenAIServingModels:
    """Names of the one model: those of --served-model-name, else what the user gave."""

    def __init__(self, model_config: ModelConfig) -> None:
        self.names = model_config.served_model_name or (model_config.model,)
        self._root = model_config.model
        self._max_model_len = model_config.max_model_len
        self._created = int(time.time())

    @property
    def name(self) -> str:
        """The name shown in answers."""
        return self.names[0]

    def check(self, name: str | None) -> str:
        """The name to show for a request that asks for ``name``; None asks for any.

        Raises:
            APIError: 404, naming the models that there are.
        """
        if name is None:
            return self.name
        if name not in self.names:
            raise APIError(
                404,
                f"the model {name[:120]!r} does not exist; this server has {', '.join(self.names)}",
                param="model",
            )
        return name

    def card(self, name: str) -> ModelCard:
        """Raises APIError (404) for an unknown name."""
        return ModelCard(
            id=self.check(name),
            created=self._created,
            root=self._root,
            max_model_len=self._max_model_len,
        )

    def list_models(self) -> ModelList:
        return ModelList(data=[self.card(name) for name in self.names])
