"""Activations in files: written whole or not at all, checked block by block. Knows no hooks and no models."""

from tdcache.public_names import MissingName
from tdcache.store.batches import Batches
from tdcache.store.dataset import ActivationDataset, Column
from tdcache.store.files import Files
from tdcache.store.shard_header import own_column, site_column
from tdcache.store.writer import StoreWriter

__all__ = ["ActivationDataset", "Batches", "Column", "Files", "StoreWriter", "own_column", "site_column"]

__getattr__ = MissingName(__name__)
