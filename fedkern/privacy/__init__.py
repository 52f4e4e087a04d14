"""What a run gives away: differential-privacy accounting, and an attack that measures it.

Accounting needs the packages of the extra ``privacy``; the attack needs nothing.
"""

from __future__ import annotations

from fedkern.privacy.accounting import Accountant, Figure, least_noise, need_accounting

__all__ = ["Accountant", "Figure", "least_noise", "need_accounting"]
