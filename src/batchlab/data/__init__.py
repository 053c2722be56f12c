"""Which examples make a batch.

This module only hands on the public names, each loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchlab.core.handing_on import hand_on

if TYPE_CHECKING:
    from batchlab.data.batch_sampler import BatchSampler as BatchSampler
    from batchlab.data.documents.dataset_decomposition import DatasetDecomposition as DatasetDecomposition
    from batchlab.data.documents.decompose import PieceDataset as PieceDataset
    from batchlab.data.documents.decompose import Pieces as Pieces
    from batchlab.data.documents.decompose import decompose as decompose
    from batchlab.data.documents.decomposition_plan import DecompositionPlan as DecompositionPlan
    from batchlab.data.documents.decomposition_plan import plan_decomposition as plan_decomposition
    from batchlab.data.documents.documents import Documents as Documents
    from batchlab.data.documents.pack import Packing as Packing
    from batchlab.data.documents.pack import pack as pack
    from batchlab.data.documents.packed_batch import PackedBatch as PackedBatch
    from batchlab.data.documents.packed_batch import PackedDocuments as PackedDocuments
    from batchlab.data.documents.packed_batch import cu_seqlens as cu_seqlens
    from batchlab.data.documents.packed_batch import document_block_mask as document_block_mask
    from batchlab.data.documents.packed_batch import document_mask as document_mask
    from batchlab.data.documents.packed_batch import packed_batch as packed_batch
    from batchlab.data.documents.packed_batches import PackedBatches as PackedBatches
    from batchlab.data.duplicates.deduplicate import deduplicate as deduplicate
    from batchlab.data.duplicates.duplicates import Deduplication as Deduplication
    from batchlab.data.lengths.bucket_batches import BucketBatchSampler as BucketBatchSampler
    from batchlab.data.lengths.bucket_batches import sizes_for_budget as sizes_for_budget
    from batchlab.data.lengths.length_buckets import LengthBuckets as LengthBuckets
    from batchlab.data.lengths.length_buckets import estimate_bins as estimate_bins
    from batchlab.data.lengths.length_buckets import estimate_bins_2d as estimate_bins_2d
    from batchlab.data.lengths.length_buckets import padding_share as padding_share
    from batchlab.data.mining.b3_batches import B3Batches as B3Batches
    from batchlab.data.mining.b3_batches import B3Index as B3Index
    from batchlab.data.mining.b3_batches import b3_batches as b3_batches
    from batchlab.data.mixtures.blend import Blend as Blend
    from batchlab.data.mixtures.blend import temperature_weights as temperature_weights
    from batchlab.data.mixtures.mixture import mixture_report as mixture_report
    from batchlab.data.mixtures.mixture import rrgs as rrgs
    from batchlab.data.mixtures.unmixed_tasks import TaskData as TaskData
    from batchlab.data.mixtures.unmixed_tasks import UnmixedTasks as UnmixedTasks
    from batchlab.data.multigrid.multigrid_batches import MultigridBatches as MultigridBatches
    from batchlab.data.multigrid.resample import Resampled as Resampled
    from batchlab.data.multigrid.resample import resample as resample
    from batchlab.data.stream import SampleStream as SampleStream
    from batchlab.data.stream_batches import StreamBatches as StreamBatches

_HOME = {
    "BatchSampler": "batch_sampler",
    "DatasetDecomposition": "documents.dataset_decomposition",
    "PieceDataset": "documents.decompose",
    "Pieces": "documents.decompose",
    "decompose": "documents.decompose",
    "DecompositionPlan": "documents.decomposition_plan",
    "plan_decomposition": "documents.decomposition_plan",
    "Documents": "documents.documents",
    "Packing": "documents.pack",
    "pack": "documents.pack",
    "PackedBatch": "documents.packed_batch",
    "PackedDocuments": "documents.packed_batch",
    "cu_seqlens": "documents.packed_batch",
    "document_block_mask": "documents.packed_batch",
    "document_mask": "documents.packed_batch",
    "packed_batch": "documents.packed_batch",
    "PackedBatches": "documents.packed_batches",
    "deduplicate": "duplicates.deduplicate",
    "Deduplication": "duplicates.duplicates",
    "BucketBatchSampler": "lengths.bucket_batches",
    "sizes_for_budget": "lengths.bucket_batches",
    "LengthBuckets": "lengths.length_buckets",
    "estimate_bins": "lengths.length_buckets",
    "estimate_bins_2d": "lengths.length_buckets",
    "padding_share": "lengths.length_buckets",
    "B3Batches": "mining.b3_batches",
    "B3Index": "mining.b3_batches",
    "b3_batches": "mining.b3_batches",
    "Blend": "mixtures.blend",
    "temperature_weights": "mixtures.blend",
    "mixture_report": "mixtures.mixture",
    "rrgs": "mixtures.mixture",
    "TaskData": "mixtures.unmixed_tasks",
    "UnmixedTasks": "mixtures.unmixed_tasks",
    "MultigridBatches": "multigrid.multigrid_batches",
    "Resampled": "multigrid.resample",
    "resample": "multigrid.resample",
    "SampleStream": "stream",
    "StreamBatches": "stream_batches",
}

__all__ = [*_HOME]

__getattr__, __dir__ = hand_on(__name__, _HOME)
