"""Public architectures for the healthy set, beside those of ``foreign/models.py``: pytorchcv's light ones."""

from dataclasses import replace

from torch import nn

from ..foreign.models import Foreign, everything, pytorchcv

MOST_VALUES = 600_000  # normalised of a sample at the smallest size that runs; more only takes longer

#: Not healthy as their library builds them: TensorFlow's momentum, which is 1 minus PyTorch's.
FAULTY = {
    f"transformers {name}": f"whose momentum is TensorFlow's, {value}: that is the doctor's finding"
    for name, value in (("MobileNetV1", 0.9997), ("MobileNetV2", 0.997), ("EfficientNet", 0.99))
}

_PYTORCHCV = """
resnet20_cifar10 preresnet20_cifar10 resnext20_16x4d_cifar10 resnext20_32x2d_cifar10 seresnet20_cifar10
sepreresnet20_cifar10 densenet40_k12_cifar10 densenet40_k12_bc_cifar10 rir_cifar10 resdropresnet20_cifar10
shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10 diaresnet20_cifar10 diapreresnet20_cifar10
xdensenet40_2_k24_bc_cifar10 resnet18_wd4 resnet18_wd2 preresnet18_wd4 preresnet18_wd2
mobilenet_wd4 mobilenet_wd2 mobilenet_w3d4 mobilenet_w1 mobilenetb_wd4 mobilenetb_wd2 mobilenetb_w3d4
mobilenetb_w1 fdmobilenet_wd4 fdmobilenet_wd2 fdmobilenet_w3d4 fdmobilenet_w1
mobilenetv2_wd4 mobilenetv2_wd2 mobilenetv2_w3d4 mobilenetv2_w1 mobilenetv2b_wd4 mobilenetv2b_wd2
mobilenetv2b_w3d4 mobilenetv2b_w1 igcv3_wd4 igcv3_wd2 igcv3_w3d4 igcv3_w1
mobilenetv3_small_w7d20 mobilenetv3_small_wd2 mobilenetv3_small_w3d4 mobilenetv3_small_w1
mobilenetv3_small_w5d4 mobilenetv3_large_w7d20 mobilenetv3_large_wd2 mobilenetv3_large_w3d4
shufflenet_g1_wd4 shufflenet_g3_wd4 shufflenet_g1_wd2 shufflenet_g3_wd2 shufflenet_g1_w3d4 shufflenet_g3_w3d4
shufflenet_g1_w1 shufflenet_g2_w1 shufflenet_g3_w1 shufflenet_g4_w1 shufflenet_g8_w1
shufflenetv2_wd2 shufflenetv2_w1 shufflenetv2_w3d2 shufflenetv2b_wd2 shufflenetv2b_w1 shufflenetv2b_w3d2
menet108_8x1_g3 menet128_8x1_g4 menet160_8x1_g8 menet228_12x1_g3 menet256_12x1_g4 menet348_12x1_g3
menet352_12x1_g8 menet456_24x1_g3
sqnxt23_w1 sqnxt23_w3d2 sqnxt23_w2 sqnxt23v5_w1 sqnxt23v5_w3d2 sqnxt23v5_w2
dicenet_wd5 dicenet_wd2 dicenet_w3d4 dicenet_w7d8 dicenet_w1 dicenet_w5d4 dicenet_w3d2
espnetv2_wd2 espnetv2_w1 espnetv2_w5d4 espnetv2_w3d2
mnasnet_small mnasnet_b1 mnasnet_a1 proxylessnas_cpu proxylessnas_gpu proxylessnas_mobile fbnet_cb spnasnet
ghostnet darknet_ref darknet_tiny peleenet hardnet39ds hardnet68ds channelnet condensenet74_c4_g4
condensenet74_c8_g8 vovnet27s dla46c dla46xc dla60xc efficientnet_b0 efficientnet_b0b efficientnet_b0c
efficientnet_edge_small_b mixnet_s regnetx002 regnety002 regnetx004 regnety004 sparsenet121
resnet10 preresnet10 seresnet10 diaresnet10 bagnet9 squeezeresnet_v1_0 squeezeresnet_v1_1
cgnet_cityscapes dabnet_cityscapes lednet_cityscapes erfnet_cityscapes enet_cityscapes esnet_cityscapes
edanet_cityscapes fpenet_cityscapes ctxnet_cityscapes sinet_cityscapes fastscnn_cityscapes
"""


def light() -> dict[str, Foreign]:
    """All of both lists by name; what of it is light enough shows when it is built."""
    found = everything() | {one.name: one for one in map(pytorchcv, _PYTORCHCV.split())}
    return {name: _at_any_size(one) if name.startswith("pytorchcv") else one for name, one in found.items()}


def _at_any_size(one: Foreign) -> Foreign:
    """Its last pool takes all of the map, as it does at the size that it was made for."""

    def build() -> nn.Module:
        model = one.build()
        features = getattr(model, "features", None)
        if isinstance(getattr(features, "final_pool", None), nn.AvgPool2d):
            features.final_pool = nn.AdaptiveAvgPool2d(1)
        return model

    return replace(one, build=build)
