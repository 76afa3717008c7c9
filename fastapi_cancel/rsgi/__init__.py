"""Granian's own interface, RSGI, for any ASGI application."""

from .application import RSGI

__all__ = ["RSGI"]
