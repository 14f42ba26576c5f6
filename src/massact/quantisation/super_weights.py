"""Super weights: the few weights whose product with a massive token's activation makes the massive activation."""

from __future__ import annotations

import torch

from massact.quantisation.linears import by_rows
from massact.quantisation.roundings import Prepared
from massact.records.clusters import MASSIVE, passing
from massact.records.errors import UserError
from massact.records.kinds.scan import ScanResult

LEAST_SHARE = 0.05  # of the value that a single product must make


def super_weights(ready: Prepared, scan: ScanResult) -> dict[str, list[tuple[int, int]]]:
    """Weights that make a massive activation: module -> (output, input), at most a few.

    W[j, f] x_f, with x the mean input of the MLP's last projection at massive tokens, is 5 % or more of the cluster's
    value at dim j: found by the product, not by size. Source: Yu et al. 2024, arXiv 2411.07191.

    Raises:
        UserError: there is none.
    """
    known = passing(scan.clusters)
    known = known[(known["stack"] == ready.stack) & (known["label"] == MASSIVE) & (known["dim"] >= 0)]
    found: dict[str, list[tuple[int, int]]] = {}
    for site in ready.linears.at("mlp_act"):
        template = ready.ranges[site].template() if site in ready.ranges else None
        for name in ready.linears.readers[site] if template is not None else ():
            module = ready.model.module.get_submodule(name)
            weight = module.weight.detach().float()
            w_OF = weight if by_rows(module) else weight.T
            for row in known.itertuples():
                cluster = ready.massive.clusters.index(f"{row.dim}@{row.position_class}")
                product_F = w_OF[int(row.dim)] * template[cluster].to(w_OF.device)  # type: ignore[index]
                large = product_F.nan_to_num(0).abs() >= LEAST_SHARE * abs(float(row.mean))
                mine = [(int(row.dim), int(f)) for f in torch.nonzero(large).flatten()]
                found[name] = list(dict.fromkeys([*found.get(name, []), *mine]))
    found = {name: places for name, places in found.items() if places}
    if not found:
        raise UserError("No super weights were found.",
                        f"No product of one weight and its input makes {LEAST_SHARE:.0%} of a massive activation.",
                        "Leave out +super.")  # fmt: skip
    return found
