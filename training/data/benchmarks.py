"""Which published data set a folder holds, by the names of its lines: a mean is the set's only if all of them are in.

Plain tables; comes after `detect.categories`. Names are those of the folders as their publishers pack them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from training.data.detect import Category


class Benchmark(NamedTuple):
    """A published data set.

    Attributes:
        title: as people call it.
        layouts: readers that it comes in.
        categories: names of all of its lines; empty where it has one line only, whose folder may have any name.
    """

    title: str
    layouts: tuple[str, ...]
    categories: tuple[str, ...] = ()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


BENCHMARKS: Mapping[str, Benchmark] = {
    "mvtec_ad": Benchmark(
        "MVTec AD",
        ("mvtec",),
        _names(
            "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush "
            "transistor wood zipper"
        ),
    ),
    "mvtec_loco": Benchmark(
        "MVTec LOCO AD", ("loco",), ("breakfast_box", "juice_bottle", "pushpins", "screw_bag", "splicing_connectors")
    ),
    "mvtec_ad2": Benchmark(
        "MVTec AD 2",
        ("mvtec_ad2",),
        ("can", "fabric", "fruit_jelly", "rice", "sheet_metal", "vial", "wallplugs", "walnuts"),
    ),
    "visa": Benchmark(
        "VisA",
        ("visa", "mvtec"),
        _names("candle capsules cashew chewinggum fryum macaroni1 macaroni2 pcb1 pcb2 pcb3 pcb4 pipe_fryum"),
    ),
    "real_iad": Benchmark(
        "Real-IAD",
        ("real_iad",),
        _names(
            "audiojack bottle_cap button_battery end_cap eraser fire_hood mint mounts pcb "
            "phone_battery plastic_nut plastic_plug porcelain_doll regulator rolled_strip_base "
            "sim_card_set switch tape terminalblock toothbrush toy toy_brick transistor1 u_block usb "
            "usb_adaptor vcpill wooden_beads woodstick zipper"
        ),
    ),
    "btad": Benchmark("BTAD", ("btad",), ("01", "02", "03")),
    "magnetic_tile": Benchmark("MTD", ("magnetic_tile",)),
    "dagm": Benchmark("DAGM 2007", ("dagm",), tuple(f"Class{number}" for number in range(1, 11))),
    "kolektor_sdd2": Benchmark("KolektorSDD2", ("kolektor_sdd2",)),
    "elpv": Benchmark("elpv", ("elpv_mono", "elpv_poly"), ("mono", "poly")),
}


def identify(lines: Sequence[Category]) -> str | None:
    """Return the key of the data set that all lines belong to, or None where they are nobody's or not clearly one's."""
    fitting = [
        key
        for key, benchmark in BENCHMARKS.items()
        if all(
            line.layout in benchmark.layouts and (not benchmark.categories or line.name in benchmark.categories)
            for line in lines
        )
    ]
    return fitting[0] if len(fitting) == 1 and lines else None
