"""Clients' connections: sockets, frames, descriptors, and the limits of each. No operation is known here."""
