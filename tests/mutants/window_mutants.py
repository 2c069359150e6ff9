"""Mistakes of lossless windows, each with the test that must catch it."""

from tests.mutants.mutants import Mutant

WINDOWS, SDPA_CPU = "training/model/windows.py", "training/model/kernels/sdpa_cpu.py"
BY_REACH = "tests/unit/test_model_windows.py::test_keys_out_of_reach_weigh_less_than_the_limit"
BY_EQUAL = "tests/unit/test_model_windows.py::test_the_bound_is_tight_where_scores_are_equal"
BY_LOST = "tests/unit/test_model_windows.py::test_no_row_of_sdpa_loses_more_than_the_limit"
BY_BATCH = "tests/unit/test_model_windows.py::test_outputs_and_gradients_of_a_batch_are_the_exact_ones"
BY_NAN = "tests/unit/test_model_windows.py::test_a_number_that_is_none_spreads_as_without_windows"

SEARCH = "training/model/kernels/tile_search_triton.py"
NEXT = "training/model/kernels/next_token_triton.py"
BY_NEXT = "tests/unit/test_next_token.py::test_what_is_not_read_has_no_weight"
BY_PARTS = "tests/unit/test_next_token.py::test_parts_equal_the_formula[dtype2-32]"
BY_AGREEMENT = "tests/unit/test_next_token.py::test_parts_agree_where_the_newest_key_is_the_largest"
BY_DECODING = "tests/unit/test_next_token.py::test_a_model_decodes_by_parts[from the first token-alibi]"
BY_GROWING = "tests/unit/test_next_token.py::test_a_model_decodes_by_parts[in larger buffers-alibi]"
BY_SEARCH = "tests/unit/test_tile_search.py::test_what_is_left_out_has_no_weight"
BY_SUM = "tests/unit/test_tile_search.py::test_the_weights_of_tiles_add_up"
BY_SEEN = "tests/unit/test_tile_search.py::test_keys_that_are_not_seen_count_for_nothing"
BY_SEARCH_NAN = "tests/unit/test_tile_search.py::test_all_tiles_are_taken_where_a_number_is_not_finite[near key-nan]"
BY_HALF = "tests/unit/test_model_windows.py::test_keys_of_equal_weight_fill_half_of_the_limit"

WINDOW_MUTANTS = (
    Mutant(
        "windows: keys without weight and those out of reach may each weigh the whole limit",
        WINDOWS,
        "math.log(SEARCH_PART * share_limit(q.dtype))",
        "math.log(share_limit(q.dtype))",
        BY_HALF,
    ),
    Mutant(
        "windows: what the keys looked at before weigh is forgotten",
        WINDOWS,
        "shares = torch.logaddexp(spent[..., None], shares)",
        "shares = shares + 0 * spent[..., None].exp()",
        BY_HALF,
    ),
    Mutant(
        "windows: a step of keys weighs as its heaviest one",
        WINDOWS,
        "known = several - slope",
        "known = -slope",
        BY_HALF,
    ),
    Mutant(
        "windows: a step of keys is as far as its furthest one",
        WINDOWS,
        "torch.arange(first + step - 1 - position, stop - position, step",
        "torch.arange(first - position, stop - position, step",
        BY_LOST,
    ),
    Mutant(
        "windows: the first sequence's scores decide for the batch",
        WINDOWS,
        "shares.amax((0, 1))",
        "shares[0].amax(0)",
        BY_HALF,
    ),
    Mutant(
        "windows: scores that are no number leave keys out",
        WINDOWS,
        "[share <= limit for share",
        "[not share > limit for share",
        BY_NAN + "[3-nan]",
    ),
    Mutant(
        "tile search: what the tiles looked at before weigh is forgotten",
        SEARCH,
        "spent += tl.exp",
        "spent = tl.exp",
        BY_SUM,
    ),
    Mutant(
        "tile search: a tile is as far as its furthest key",
        SEARCH,
        "((row - tile - 1) * TILE + 1)",
        "((row - tile) * TILE)",
        BY_SEARCH,
    ),
    Mutant(
        "tile search: a tile weighs as its heaviest key",
        SEARCH,
        "known = of_tile - sums",
        "known = -sums",
        BY_SEARCH,
    ),
    Mutant(
        "tile search: the sums of weights count keys behind the query",
        SEARCH,
        "(distance >= 0) & (distance <= behind[:, None])",
        "distance <= behind[:, None]",
        BY_SEARCH,
    ),
    Mutant(
        "tile search: the sums of weights count keys that a query does not see",
        SEARCH,
        "(distance >= 0) & (distance <= behind[:, None])",
        "distance >= 0",
        BY_SEEN,
    ),
    Mutant(
        "tile search: one row of a tile decides for all",
        SEARCH,
        "tl.sum((spent <= tl.exp(limit)).to(tl.int32), 0) == TILE",
        "tl.sum((spent <= tl.exp(limit)).to(tl.int32), 0) > 0",
        BY_SEARCH,
    ),
    Mutant(
        "tile search: a weight that is no number leaves tiles out",
        SEARCH,
        "tl.sum((spent <= tl.exp(limit)).to(tl.int32), 0) == TILE",
        "tl.sum((spent > tl.exp(limit)).to(tl.int32), 0) == 0",
        BY_SEARCH_NAN,
    ),
    Mutant(
        "tile search: tiles looked at and those out of reach may each weigh the whole limit",
        "training/model/kernels/tile_search.py",
        "math.log(SEARCH_PART * share_limit(q.dtype))",
        "math.log(share_limit(q.dtype))",
        BY_SUM,
    ),
    Mutant(
        "next token: half the bound",
        "training/model/kernels/reach_triton.py",
        "+ _SLACK) / slope",
        "+ _SLACK) / slope / 2",
        BY_NEXT,
    ),
    Mutant(
        "next token: one key is bounded, not all beyond it",
        NEXT,
        "keys_in_reach(largest, known, endless, limit",
        "keys_in_reach(largest, known, 0.0, limit",
        BY_NEXT,
    ),
    Mutant(
        "next token: the first part's new norm moves the others",
        NEXT,
        "    norm = tl.maximum(norm, tl.sqrt(tl.sum(squares, 0)), propagate_nan=tl.PropagateNan.ALL)\n"
        "    largest = tl.sqrt(tl.sum(own * own, 0)) * norm * scale\n",
        "    largest = tl.sqrt(tl.sum(own * own, 0)) * norm * scale\n"
        "    norm = tl.maximum(norm, tl.sqrt(tl.sum(squares, 0)), propagate_nan=tl.PropagateNan.ALL)\n",
        BY_AGREEMENT,
    ),
    Mutant(
        "next token: the largest norm leaves out the token's own key",
        NEXT,
        "tl.store(radius + pair, norm)",
        "tl.store(radius + pair, tl.load(radius + pair))",
        BY_PARTS,
    ),
    Mutant(
        "next token: the last part ends before the query's own key",
        NEXT,
        "tl.minimum(first + each, last + 1)",
        "tl.minimum(first + each, last)",
        BY_DECODING,
    ),
    Mutant(
        "next token: parts are joined as if they weighed the same",
        NEXT,
        "weights = tl.exp(known - tl.max(known, 0))",
        "weights = tl.where(known > -1e30, 1.0, 0.0)",
        BY_DECODING,
    ),
    Mutant(
        "cache: larger buffers know no norm of the tokens that smaller ones decoded",
        "training/model/decoding.py",
        "norms(keys[:, :, : cache.length]).amax(2, keepdim=True)",
        "cache.radii[block]",
        BY_GROWING,
    ),
    Mutant(
        "windows: half the bound",
        WINDOWS,
        "+ SLACK) / slope",
        "+ SLACK) / slope / 2",
        BY_REACH,
    ),
    Mutant(
        "windows: the bound takes the score's sum for granted",
        WINDOWS,
        "(score - sums - (",
        "(score - (",
        BY_REACH,
    ),
    Mutant(
        "windows: a key alone is bounded, not all beyond it",
        WINDOWS,
        "- (-torch.expm1(-slope)).log() ",
        "",
        BY_EQUAL,
    ),
    Mutant(
        "windows: keys that weigh a hundred times the limit are left out",
        WINDOWS,
        "limit = math.log(part * share_limit(q.dtype))",
        "limit = math.log(100 * part * share_limit(q.dtype))",
        BY_EQUAL,
    ),
    Mutant(
        "windows: mean norm of the keys, not the largest",
        SDPA_CPU,
        "norms(k.detach()).cummax(2).values",
        "norms(k.detach()).mean(2, keepdim=True)",
        BY_LOST,
    ),
    Mutant(
        "windows: norms of the nearest far key alone",
        SDPA_CPU,
        "norms(k.detach()).cummax(2).values",
        "norms(k.detach())",
        BY_LOST,
    ),
    Mutant(
        "windows: places count from the first key, not from the block's first query",
        WINDOWS,
        "torch.arange(position, position + distances.shape[2]",
        "torch.arange(position + distances.shape[2] - 1, position + 2 * distances.shape[2] - 1",
        BY_LOST,
    ),
    Mutant(
        "windows: a block of keys is left out if it lies in part beyond reach",
        WINDOWS,
        "int(first) // step * step",
        "-(-int(first) // step) * step",
        BY_LOST,
    ),
    Mutant(
        "windows: the nearest far key is left out",
        WINDOWS,
        "yield heads, slice(first, end)",
        "yield heads, slice(first, max(first + 1, end - 1))",
        BY_LOST,
    ),
    Mutant(
        "windows: neighbouring heads take the first one's window",
        WINDOWS,
        "groupby(min(first, end) for first in firsts)",
        "groupby((min(first, end) for first in firsts), lambda first: first < end)",
        BY_LOST,
    ),
    Mutant(
        "windows: a batch takes its first sequence's",
        WINDOWS,
        "amin((0, 2))",
        "amin(2)[0]",
        BY_BATCH,
    ),
    Mutant(
        "windows: a bound that is no number leaves all out",
        WINDOWS,
        "nan_to_num(nan=0.0)",
        "nan_to_num(nan=1e9)",
        BY_NAN + "[3-nan]",
    ),
)
