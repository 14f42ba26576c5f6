"""Massive activations in images: where they are on the picture, registers as biases, registers at test time.

Takes a model of images and a corpus of `pixel_values`; gives arrays and tables (maps, histograms, attention shares,
register means, register neurons) and edits. Knows that the tokens of an image are a class token, registers and a grid
of patches. Must not know files, figures, or where the pictures came from.
"""

from massact.interventions.registers import CONTROLS, Registers, collect_registers, fix_registers, register_means
from massact.positions import Layout, read_layout
from massact.scans.maps import PatchMaps, marked, massive_patches, neighbour_cosines, norm_histograms
from massact.vision.maps import outlier_patches, patch_maps
from massact.vision.moving import moved_neurons, register_neurons, test_time_registers
from massact.vision.published import PUBLISHED, check_published
from massact.vision.shares import attention_shares
from massact.vision.sinks import visual_sinks

__all__ = [
    "CONTROLS",
    "PUBLISHED",
    "Layout",
    "PatchMaps",
    "Registers",
    "attention_shares",
    "check_published",
    "collect_registers",
    "fix_registers",
    "marked",
    "massive_patches",
    "moved_neurons",
    "neighbour_cosines",
    "norm_histograms",
    "outlier_patches",
    "patch_maps",
    "read_layout",
    "register_means",
    "register_neurons",
    "test_time_registers",
    "visual_sinks",
]
