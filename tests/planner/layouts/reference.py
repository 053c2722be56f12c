"""The memory and time of one layout, written out in plain numbers for one layout at a time: what the arrays must equal.

Also every layout that divides, by trial of all integers, and 1F1B as a discrete-event simulation.
"""

from __future__ import annotations

import math

from batchlab.planner.layouts.grid import SHARDINGS


def triples(shape, cluster, *, global_batch, sequence_length, uneven):
    """(dp, tp, pp, b, m, checkpointing, sequence parallel, sharding) of all layouts that divide."""
    found = set()
    for tp in range(1, cluster.node_size + 1):
        if cluster.node_size % tp or shape.heads % tp or shape.mlp % tp:
            continue
        if shape.kv_heads % tp and tp % shape.kv_heads:
            continue
        for pp in range(1, shape.layers + 1):
            if not uneven and shape.layers % pp:
                continue
            for dp in range(1, cluster.devices + 1):
                if dp * tp * pp != cluster.devices:
                    continue
                for b in range(1, global_batch + 1):
                    if global_batch % (dp * b):
                        continue
                    for sequence in (False, True):
                        if sequence and (tp == 1 or sequence_length % tp):
                            continue
                        for sharding in range(4 if dp > 1 else 1):
                            found |= {
                                (dp, tp, pp, b, global_batch // (dp * b), c, sequence, sharding) for c in (False, True)
                            }
    return found


def bytes_of(shape, row, costing):
    """Bytes of the fuller of first and last stage: the largest over all stages."""
    dp, tp, pp, b, m, checkpointing, sequence, sharding = row
    numbers, block, s = costing.precision, costing.block, costing.sequence_length
    layers = [shape.layers // pp + (i < shape.layers % pp) for i in range(pp)]
    kv = max(shape.kv_heads / tp, 1) / shape.kv_heads
    layer = shape.layer_split / tp + shape.layer_kv * kv + shape.layer_whole
    words = math.ceil(shape.vocabulary / tp) * shape.hidden
    most = 0.0
    for i in range(pp):
        outside = 0
        if i == 0:
            outside += words + shape.positions * shape.hidden
        if i == pp - 1:
            outside += shape.norm_parameters + (0 if shape.tied and pp == 1 else words)
        parameters = layers[i] * layer + outside
        weights = parameters * numbers.weight / (dp if sharding == 3 else 1)
        if sharding == 3:
            weights += (outside + min(2, layers[i]) * layer) * (numbers.copy or numbers.weight)
        else:
            weights += parameters * numbers.copy
        gradients = parameters * numbers.gradient / (dp if sharding >= 2 else 1)
        gradients += layer * numbers.gradient if sharding >= 2 else 0
        states = weights + gradients + parameters * numbers.state / (dp if sharding >= 1 else 1)
        part = tp if sequence else 1
        full = b * s * (block.whole / part + block.split / tp) + b * shape.heads * s * s * block.scores / tp
        flight = min(m, pp - i)
        loss = 0.0
        if i == pp - 1:
            each = (numbers.activation + 12) * shape.vocabulary / (tp if costing.loss_parallel else 1)
            loss = b * s * (each + (2 * numbers.activation * shape.hidden + 4) / part)
        if checkpointing:
            again = full + max(b * s * block.backward, b * shape.heads * s * s * block.backward_scores) / tp
            total = states + b * s * block.boundary / part * layers[i] * flight + max(again, loss)
        else:
            total = states + full * layers[i] * flight + loss
        most = max(most, total)
    return most


def seconds_of(shape, row, costing, cluster, e):
    """Seconds of one update."""
    dp, tp, pp, b, m, checkpointing, sequence, sharding = row
    numbers, block, s, device = costing.precision, costing.block, costing.sequence_length, cluster.device
    tokens, part, passes = b * s, tp if sequence else 1, 4 if checkpointing else 3
    peak = device.peak_flops * e.matmul / (1 + tp * e.half_width / shape.hidden + e.half_tokens / tokens)
    stream, link = device.memory_bandwidth * e.memory, device.link_bandwidth * e.link
    network = cluster.inter_node_bandwidth * e.network
    flops = tokens * (2 * shape.layer_matrices + 4 * s * shape.heads * shape.head_dim * block.attention_share)
    moved = tokens * (block.moved_whole / part + block.moved_split / tp)
    moved += b * shape.heads * s * s * block.moved_scores / tp
    matrices = max(flops / tp / peak, numbers.activation * shape.layer_matrices / tp / stream)
    work = passes * max(matrices + moved / stream, e.host_seconds)
    ring = 2 * (tp - 1) / tp * tokens * numbers.activation * shape.hidden / link + 2 * (tp - 1) * cluster.link_latency
    tensor = (6 if checkpointing else 4) * ring * (1 - e.tensor_overlap)
    loss = 6 * tokens * shape.embedding / tp / peak
    loss += tokens * shape.vocabulary * (24 + 5 * numbers.activation) / (tp if costing.loss_parallel else 1) / stream
    transfer = 0.0
    if pp > 1:
        inside = dp * tp * pp <= cluster.node_size
        size = tokens * numbers.activation * shape.hidden / part
        transfer = 2 * (size / link + cluster.link_latency if inside else size / network + cluster.inter_node_latency)
        transfer *= 1 - e.pipeline_overlap
    layers = [shape.layers // pp + (i < shape.layers % pp) for i in range(pp)]
    stages = [n * (work + tensor) + transfer + (loss if i == pp - 1 else 0) for i, n in enumerate(layers)]
    parameters = _most_parameters(shape, tp, pp)
    times = {
        0: 2 * numbers.gradient,
        1: numbers.weight + numbers.gradient,
        2: numbers.weight + m * numbers.gradient,
        3: m * (2 * numbers.weight + numbers.gradient),
    }[sharding]
    rounds = {0: 2, 1: 2, 2: 1 + m, 3: 3 * m * layers[0]}[sharding]
    inside = tp * dp <= cluster.node_size
    speed = link if inside else min(link, network * min(dp, max(1, cluster.node_size // tp)))
    latency = cluster.link_latency if inside else cluster.inter_node_latency
    data = times * parameters * (dp - 1) / dp / speed + rounds * (dp - 1) * latency
    update = parameters / (dp if sharding else 1) * (numbers.gradient + 2 * numbers.state + numbers.weight) / stream
    return sum(stages) + (m - 1) * max(stages) + data * (1 - e.data_overlap) + update


def _most_parameters(shape, tp, pp):
    kv = max(shape.kv_heads / tp, 1) / shape.kv_heads
    layer = shape.layer_split / tp + shape.layer_kv * kv + shape.layer_whole
    words = math.ceil(shape.vocabulary / tp) * shape.hidden
    first, last = words + shape.positions * shape.hidden, words + shape.norm_parameters
    if pp == 1:
        return shape.layers * layer + first + last - (words if shape.tied else 0)
    return max(math.ceil(shape.layers / pp) * layer + first, shape.layers // pp * layer + last)


def one_forward_one_backward(forward, backward, micro_batches):
    """Time at which the last stage's pass ends, and the most micro-batches that each stage holds.

    Stage i runs min(p - i - 1, m) forward passes, then one forward and one backward in turn, then what backward passes
    are left. Each pass starts when the stage is free and its neighbour's part is done.
    """
    p, m = len(forward), micro_batches
    todo = []
    for i in range(p):
        warm = min(p - i - 1, m)
        steady = [pass_ for k in range(m - warm) for pass_ in (("F", warm + k), ("B", k))]
        todo.append([*(("F", k) for k in range(warm)), *steady, *(("B", k) for k in range(m - warm, m))])
    done, free, held, most = {}, [0] * p, [0] * p, [0] * p
    while any(todo):
        progress = False
        for i in range(p):
            while todo[i]:
                kind, k = todo[i][0]
                before = ("F", i, k) if kind == "B" and i == p - 1 else (kind, i + (1 if kind == "B" else -1), k)
                if before[1] >= 0 and before not in done:
                    break
                start = max(free[i], done.get(before, 0))
                free[i] = done[kind, i, k] = start + (forward if kind == "F" else backward)[i]
                held[i] += 1 if kind == "F" else -1
                most[i] = max(most[i], held[i])
                todo[i].pop(0)
                progress = True
        assert progress
    return max(free), most


def rows_of(grid):
    """A grid's layouts as plain tuples."""
    return [tuple(column.tolist()[i] for column in grid) for i in range(len(grid.dp))]


__all__ = ["SHARDINGS", "bytes_of", "one_forward_one_backward", "rows_of", "seconds_of", "triples"]
