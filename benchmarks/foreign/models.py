"""Which models: timm's families, pytorchcv's, and transformers' with batch norm; all with random weights.

From each file of timm with batch norm in it come its smallest models, from the large files more. Inputs are
the smallest that run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .stub import import_timm

SIZES = (64, 96, 128, 160)

# By the file of timm/models that they are in.
TIMM = {
    "byoanet": (
        "halonet_h1 eca_botnext26ts_256 eca_halonext26ts botnet26t_256 lambda_resnet26t "
        "lamhalobotnet50ts_256 sebotnet33ts_256"
    ),
    "byobnet": (
        "test_byobnet mobileone_s1 mobileone_s0 mobileone_s2 gernet_s resnet32ts gcresnext26ts "
        "bat_resnext26ts regnetz_b16 repvgg_a0"
    ),
    "convmixer": "convmixer_768_32 convmixer_1024_20_ks9_p14",
    "cpubone": "cpubone_nano cpubone_t0",
    "cspnet": "cs3darknet_focus_s cs3darknet_s cs3darknet_focus_m darknet17 darknet53 cspresnet50",
    "cspnext": "cspnext_tiny cspnext_s",
    "densenet": "densenet121 densenetblur121d",
    "dla": "dla46x_c dla46_c dla34 dla60x_c",
    "dpn": "dpn48b dpn68",
    "efficientformer": "efficientformer_l1 efficientformer_l3",
    "efficientformer_v2": "efficientformerv2_s0 efficientformerv2_s1",
    "efficientnet": (
        "test_efficientnet mobilenetv2_035 mobilenetv2_050 mnasnet_small tinynet_e efficientnet_b0 "
        "mixnet_s gc_efficientnetv2_rw_t tf_efficientnet_lite0 tf_efficientnetv2_b0 fbnetc_100 "
        "spnasnet_100 semnasnet_050 efficientnet_es efficientnet_b1_pruned"
    ),
    "efficientvim": "efficientvim_m1 efficientvim_m1_dist",
    "efficientvit_mit": "efficientvit_b0 efficientvit_b1",
    "efficientvit_msra": "efficientvit_m0 efficientvit_m1 efficientvit_m2",
    "fasternet": "fasternet_t0 fasternet_t1",
    "fastvit": "fastvit_t8 fastvit_t12",
    "ghostnet": "ghostnet_050 ghostnetv3_050 ghostnet_100",
    "hardcorenas": "hardcorenas_b hardcorenas_a hardcorenas_c",
    "hgnet": "hgnetv2_b0 hgnetv2_b1",
    "hrnet": "hrnet_w18_small hrnet_w18_small_v2",
    "iformer": "iformer_t iformer_s",
    "inception_next": "inception_next_atto inception_next_tiny",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small lcnetv2_base",
    "levit": "levit_128s levit_128",
    "lowformer": "lowformer_b0 lowformer_b1",
    "maxxvit": "test_coatnet test_maxvit maxvit_pico_rw_256 coatnet_nano_rw_224 maxvit_rmlp_pico_rw_256",
    "mobilenetv3": (
        "lcnet_035 mobilenetv3_small_050 lcnet_050 mobilenetv4_conv_small_035 mobilenetv4_conv_small_050 "
        "mobilenetv3_large_100 mobilenetv4_conv_small mobilenetv3_small_075 lcnet_075 "
        "mobilenetv3_small_100 lcnet_100 mobilenetv3_large_075"
    ),
    "mobilevit": "mobilevit_xxs mobilevitv2_050 mobilevit_xs mobilevitv2_075 mobilevitv2_100",
    "nasnet": "nasnetalarge",
    "nextvit": "nextvit_small",
    "pnasnet": "pnasnet5large",
    "regnet": "regnetx_002 regnety_002 regnety_004",
    "repghost": (
        "repghostnet_050 repghostnet_058 repghostnet_080 repghostnet_100 repghostnet_111 repghostnet_130"
    ),
    "repvit": "repvit_m1 repvit_m0_9",
    "res2net": "res2next50 res2net50_14w_8s",
    "resnest": "resnest14d resnest26d",
    "resnet": (
        "test_resnet resnet10t resnet14t resnet18 resnet18d resnet50 resnet26d seresnet50 ecaresnet26t "
        "wide_resnet50_2 resnext50_32x4d resnetblur18 resnetaa34d seresnext26t_32x4d"
    ),
    "resnetv2": "resnetv2_18 resnetv2_18d resnetv2_50",
    "rexnet": "rexnet_100 rexnetr_100",
    "selecsls": "selecsls42 selecsls60",
    "senet": "legacy_seresnet18 legacy_seresnext26_32x4d",
    "shvit": "shvit_s1 shvit_s2",
    "sknet": "skresnet18 skresnet34 skresnext50_32x4d",
    "starnet": "starnet_s050 starnet_s100 starnet_s150 starnet_s1 starnet_s2",
    "swiftformer": "swiftformer_xs swiftformer_s",
    "tiny_vit": "tiny_vit_5m_224 tiny_vit_11m_224",
    "tresnet": "tresnet_m",
    "vgg": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_small_resnet50d_s16_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw ese_vovnet19b_slim ese_vovnet39b",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p xception41",
    "xcit": (
        "xcit_nano_12_p8_224 xcit_nano_12_p16_224 xcit_tiny_12_p8_224 xcit_tiny_12_p16_224 "
        "xcit_nano_12_p8_384 xcit_nano_12_p16_384"
    ),
}

PYTORCHCV = (
    "resnet10 preresnet10 seresnet10 densenet121 peleenet darknet_ref mobilenet_wd4 fdmobilenet_wd4 "
    "mobilenetv2_wd4 igcv3_wd4 mnasnet_small proxylessnas_cpu fbnet_cb shufflenet_g1_wd4 "
    "shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3 condensenet74_c4_g4 ghostnet efficientnet_b0 "
    "efficientnet_edge_small_b vovnet27s dla46c hrnet_w18_small_v1 dicenet_wd5 spnasnet bninception "
    "rir_cifar10 resnet20_cifar10 preresnet20_cifar10 diaresnet20_cifar10 wrn16_10_cifar10 "
    "densenet40_k12_cifar10 shakeshakeresnet20_2x16d_cifar10 pyramidnet110_a48_cifar10 ror3_56_cifar10 "
    "hardnet39ds cgnet_cityscapes lednet_cityscapes erfnet_cityscapes enet_cityscapes dabnet_cityscapes "
    "sinet_cityscapes unet_cityscapes "
)

Inputs = tuple[Tensor, ...] | dict[str, Tensor]  # positional, or by keyword


@dataclass(frozen=True)
class Foreign:
    """A model of another library: how it is built, and its input for a batch of some size."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]  # of a batch size, an image size and a seed
    sizes: tuple[int, ...] = (*SIZES, 224, 256)


def _images(batch: int, size: int, seed: int) -> Inputs:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)),)


def _timm(name: str) -> Foreign:
    def build() -> nn.Module:
        model: nn.Module = import_timm().create_model(name, num_classes=10)
        return model

    return Foreign(f"timm {name}", build, _images)


def pytorchcv(name: str) -> Foreign:
    """A model of pytorchcv; those for CIFAR take 32×32 pixels."""

    def build() -> nn.Module:
        model: nn.Module = import_module("pytorchcv.model_provider").get_model(name, pretrained=False)
        return model

    sizes = (32,) if "cifar" in name else (*SIZES, 224)
    return Foreign(f"pytorchcv {name}", build, _images, sizes)


def _noise(*shape: int) -> Callable[[int, int, int], Inputs]:
    def make(batch: int, _size: int, seed: int) -> Inputs:
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed)),)

    return make


def _speech(batch: int, _size: int, seed: int) -> Inputs:
    sound = torch.randn(batch, 1600, generator=torch.Generator().manual_seed(seed))
    return {"input_values": sound}


def _series(batch: int, _size: int, seed: int) -> Inputs:
    values = torch.randn(batch, 32, 3, generator=torch.Generator().manual_seed(seed))
    return {"past_values": values}


_TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
_CONVOLUTIONS = {"conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3)}

# Class, settings that make it small, inputs.
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], Callable[[int, int, int], Inputs]]] = {
    "ResNet": ("ResNetForImageClassification", _STAGES, _images),
    "ResNet bottleneck": (
        "ResNetForImageClassification",
        {**_STAGES, "layer_type": "bottleneck", "hidden_sizes": [16, 32], "hidden_act": "silu"},
        _images,
    ),
    "RegNet": ("RegNetForImageClassification", {**_STAGES, "groups_width": 4}, _images),
    "MobileNetV1": ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}, _images),
    "MobileNetV2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.35}, _images),
    "EfficientNet": (
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.35, "depth_coefficient": 0.4, "hidden_dim": 448},
        _images,
    ),
    "LeViT": (
        "LevitForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "key_dim": [4, 4, 4],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
        },
        _noise(3, 64, 64),
    ),
    "MobileViT": (
        "MobileViTForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        _noise(3, 64, 64),
    ),
    "MobileViTV2": (
        "MobileViTV2ForImageClassification",
        {"image_size": 64, "width_multiplier": 0.25},
        _noise(3, 64, 64),
    ),
    "SwiftFormer": (
        "SwiftFormerForImageClassification",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]},
        _images,
    ),
    "HGNetV2": ("HGNetV2ForImageClassification", {}, _images),
    "SegFormer": (
        "SegformerForSemanticSegmentation",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        _images,
    ),
    "GLPN": (
        "GLPNForDepthEstimation",
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        _images,
    ),
    "RT-DETR's ResNet": ("RTDetrResNetBackbone", _STAGES, _images),
    "TextNet": (
        "TextNetForImageClassification",
        {"hidden_sizes": [8, 8, 16, 16, 16], "stem_out_channels": 8, "stem_num_channels": 3},
        _images,
    ),
    "PP-LCNet": ("PPLCNetForImageClassification", {}, _images),
    "Wav2Vec2-Conformer": (
        "Wav2Vec2ConformerModel",
        {**_TINY, **_CONVOLUTIONS, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 4},
        _speech,
    ),
    "HuBERT": (
        "HubertModel",
        {
            **_TINY,
            **_CONVOLUTIONS,
            "num_conv_pos_embedding_groups": 2,
            "num_conv_pos_embeddings": 4,
            "conv_pos_batch_norm": True,
        },
        _speech,
    ),
    "PatchTST": (
        "PatchTSTForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "ffn_dim": 32,
            "prediction_length": 4,
        },
        _series,
    ),
    "PatchTSMixer": (
        "PatchTSMixerForPrediction",
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 16,
            "num_layers": 2,
            "prediction_length": 4,
            "norm_mlp": "BatchNorm",
        },
        _series,
    ),
}


def _transformers(name: str) -> Foreign:
    kind, settings, inputs = TRANSFORMERS[name]

    def build() -> nn.Module:
        made = getattr(import_module("transformers"), kind)
        model: nn.Module = made(made.config_class(**settings))
        return model

    return Foreign(f"transformers {name}", build, inputs)


def everything() -> dict[str, Foreign]:
    """Every model by its name; what is not installed fails when it is built, with an ImportError."""
    found = [_timm(name) for names in TIMM.values() for name in names.split()]
    found += [pytorchcv(name) for name in PYTORCHCV.split()]
    found += [_transformers(name) for name in TRANSFORMERS]
    return {one.name: one for one in found}
