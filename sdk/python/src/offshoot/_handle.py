"""What both kinds of fork handles know of themselves."""

from __future__ import annotations

from ._models import Summary


class Handle:
    """A fork as it was when it was last looked at; the daemon is not asked."""

    _summary: Summary

    @property
    def summary(self) -> Summary:
        """What is known of it: a ForkInfo, with its identity report, where it was made or inspected by this client."""
        return self._summary

    @property
    def id(self) -> str:
        """Its id, for good."""
        return self._summary.id

    @property
    def name(self) -> str:
        """Its name, which is also its host name."""
        return self._summary.name

    @property
    def template(self) -> str:
        """The template it came from."""
        return self._summary.template

    @property
    def state(self) -> str:
        """``running``, ``standby`` or ``dead``."""
        return self._summary.state

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self._summary.labels

    @property
    def ipv4(self) -> str | None:
        """Its address, where it has a network that the host knows of."""
        return self._summary.ipv4

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.id} of {self.template}, {self.state}>"
