"""cilnorm's own parts keep what is asked of a stranger's; of the backbones one of each kind.

Norms have ``test_norms_battery.py``, which asks more of them; here each trains inside timm's network and in a run.
"""

from __future__ import annotations

import pytest

from cilnorm.testing import Check, NotChecked, checks_of

pytestmark = pytest.mark.slow

BACKBONES = {"resnet8", "resnet32-rebuffi", "timm-resnet18"}
EXPLAINS = {"imagenet100"}  # a name that only says which two it may mean
CHECKS = [
    check
    for check in checks_of("cilnorm", slow=False)
    if not (check.kind == "backbone" and (check.name not in BACKBONES or check.promise == "every_norm"))
    and check.name not in EXPLAINS
    and not (check.kind == "norm" and check.promise not in ("timm", "trains"))
]


@pytest.mark.parametrize("check", CHECKS, ids=[check.label for check in CHECKS])
def test_it_is_kept(check: Check) -> None:
    try:
        check()
    except NotChecked as error:
        pytest.skip(str(error))
