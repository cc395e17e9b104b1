"""NVIDIA GPUs as a device: what torch tells about them."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.errors import UnsupportedError
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

if TYPE_CHECKING:
    import torch

    from vllm.config import VllmConfig


class CudaPlatform(Platform):
    _enum = PlatformEnum.CUDA
    device_name = "cuda"
    device_type = "cuda"
    dispatch_key = "CUDA"
    ray_device_key = "GPU"
    device_control_env_var = "CUDA_VISIBLE_DEVICES"
    dist_backend = "nccl"
    worker_cls = "vllm.v1.worker.gpu_worker.Worker"
    # The tensor-copy engine reads 64 tokens of a page at a time: prompts' attention runs at 475
    # TFLOP/s instead of 390 with 16 (one H100, head size 128).
    default_block_size = 64
    default_max_num_batched_tokens = 8192
    runs_beside_host = True
    has_sleep_mode = sys.platform == "linux"
    attention_backend_priority = (
        "TRITON_ATTN",
        "TURBOQUANT",
        "TRITON_MLA",
        "TORCH_REF",
        "TORCH_REF_MLA",
    )

    @classmethod
    def prepare_environment(cls) -> None:
        # A program that ends in the middle of a multicast can leave the switch between GPUs unable
        # to serve anybody, until the host is restarted.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        # flash-attn-4 compiles each kernel for seconds; later starts find it.
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault(
            "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
            os.path.join(envs.VLLM_CACHE_ROOT, "flash_attention"),
        )

    @classmethod
    def set_device(cls, local_rank: int) -> torch.device:
        import torch

        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        import torch

        return torch.cuda.get_device_name(device_id)

    @classmethod
    def get_device_count(cls) -> int:
        import torch

        return torch.cuda.device_count()

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability | None:
        import torch

        return DeviceCapability(*torch.cuda.get_device_capability(device_id))

    @classmethod
    def supported_dtypes(cls) -> list[torch.dtype]:
        import torch

        if cls.has_device_capability((8, 0)):
            return [torch.bfloat16, torch.float16, torch.float32]
        return [torch.float16, torch.float32]

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        import torch

        return torch.cuda.get_device_properties(device_id).total_memory

    @classmethod
    def get_device_available_memory(cls, device_id: int = 0) -> int:
        import torch

        return torch.cuda.mem_get_info(device_id)[0]

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return True

    @classmethod
    def synchronize(cls) -> None:
        import torch

        torch.cuda.synchronize()

    @classmethod
    def seed_everything(cls, seed: int) -> None:
        super().seed_everything(seed)
        import torch

        torch.cuda.manual_seed_all(seed)

    @classmethod
    def check_config(cls, vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        if model_config.is_encoder_decoder:
            raise UnsupportedError(
                f"{model_config.architecture} has an encoder, which this engine runs on the CPU "
                "only: hide the GPUs with CUDA_VISIBLE_DEVICES=",
                parameter="model",
                value=model_config.model,
            )

    @classmethod
    def describe(cls) -> dict[str, Any]:
        import torch

        return {
            "device_type": "cuda",
            "device_name": cls.get_device_name(),
            "devices": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
        }
