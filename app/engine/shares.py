"""FairShares: which tenants may run before the others, by deficit round robin in seconds of the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

QUANTUM = 1.0
"""Seconds of the device that a tenant of weight 1 gets in a round. Within them its rows go by the batcher's order, so
that a short request ends before the turn passes on; a new tenant waits at most for one round of the others."""

DEBT = 4.0
"""Rounds that a tenant can owe. A row that only fills a forward which others leave room in is charged too; without
a bound it would pay for hours of an idle device as soon as the others come."""

LEAST = 0.001
"""A weight below this counts as this."""


@dataclass(slots=True)
class _Account:
    """credit: seconds left in this round; quantum: seconds that each round adds; rows: how many the tenant has."""

    credit: float
    quantum: float
    rows: int = 0


class FairShares:
    """Accounts of the tenants that have rows, or had some in this round or owe for them.

    Nobody has more than one quantum: idle tenants save up nothing. An account stays to the end of its round, so that
    leaving and coming back brings nothing either.
    (Shreedhar and Varghese, Efficient Fair Queuing using Deficit Round Robin, 1995; our packets are forwards.)
    """

    def __init__(self, quantum: float = QUANTUM) -> None:
        self._quantum = quantum
        self._accounts: dict[str, _Account] = {}

    def join(self, tenant: str, weight: float) -> None:
        """Count one more row of a tenant, which has this weight from now on."""
        quantum = self._quantum * max(LEAST, weight)
        account = self._accounts.setdefault(tenant, _Account(quantum, quantum))
        account.quantum = quantum
        account.rows += 1

    def leave(self, tenant: str) -> None:
        """Count one row less."""
        self._accounts[tenant].rows -= 1

    def has(self, tenant: str) -> bool:
        """Whether the tenant has credit left in this round."""
        account = self._accounts.get(tenant)
        return account is not None and account.credit > 0

    def weight(self, tenant: str) -> float:
        """The tenant's quantum: its weight beside the others'."""
        return self._accounts[tenant].quantum

    def charge(self, tenant: str, seconds: float) -> None:
        """Charge a tenant for seconds of the device."""
        account = self._accounts.get(tenant)
        if account is not None:
            account.credit = max(account.credit - seconds, -DEBT * account.quantum)

    def begin_round(self, able: Iterable[str]) -> None:
        """Add as many rounds as it takes until one of `able`, the tenants with rows that can run, has credit."""
        accounts = [self._accounts[tenant] for tenant in able]
        rounds = min(math.floor(-account.credit / account.quantum) + 1 for account in accounts)
        for tenant, account in list(self._accounts.items()):
            account.credit = min(account.credit + rounds * account.quantum, account.quantum)
            if not account.rows and account.credit >= account.quantum:
                del self._accounts[tenant]
