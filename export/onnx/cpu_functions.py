"""ONNX functions, as text, in which ONNX Runtime's CPU provider does the work of slower operators."""

from __future__ import annotations

DOMAIN = "mst_gan"  # of the functions, until they are inlined

# GridSample(border, align_corners=0) of images (N, C, h, w) as large as its grid, from the places themselves:
# x and y, (N, h, w), in pixels. The provider's kernel goes through all of the padding's cases at every corner
# of every pixel of every channel. Here the corners' indices are worked out once, over whole images: places
# are drawn into the image first, so a corner beyond the last column or row has no share, and any pixel may
# stand in for it.
_PLACES = """
    zero = Constant <value = float {{0}}> ()
    nought = Constant <value = int32 {{0}}> ()
    next = Constant <value = int32 {{1}}> ()
    sides_long = Shape <start = 1> (x)
    sides = Cast <to = 6> (sides_long)
    height, width = Split <axis = 0, num_outputs = 2> (sides)
    last_int = Sub (sides, next)
    last = Cast <to = 1> (last_int)
    last_row, last_column = Split <axis = 0, num_outputs = 2> (last)
    last_x = Squeeze (last_column)
    last_y = Squeeze (last_row)
    inside_x = Clip (x, zero, last_x)
    inside_y = Clip (y, zero, last_y)
    left = {round} (inside_x)
    top = {round} (inside_y)
    left_int = Cast <to = 6> (left)
    top_int = Cast <to = 6> (top)
    row_start = Mul (top_int, width)
    in_image = Add (row_start, left_int)
    area = Mul (height, width)
    step = Squeeze (area)
"""

# Every value of every channel has an index of its own, into all of them in a row.
_IN_PLANES = """
    channel_axis = Constant <value_ints = [1]> ()
    all = Constant <value_ints = [-1]> ()
    ones = Constant <value_ints = [1, 1]> ()
    shape = Shape (image)
    count_long = Size (image)
    count = Cast <to = 6> (count_long)
    plane_starts = Range (nought, count, step)
    planes = Shape <end = 2> (image)
    planes_shape = Concat <axis = 0> (planes, ones)
    starts = Reshape (plane_starts, planes_shape)
    in_plane = Unsqueeze (in_image, channel_axis)
    index_shaped = Add (in_plane, starts)
    index = Reshape (index_shaped, all)
    values = Reshape (image, all)
"""

# Every pixel has one index, into all pixels in a row.
_IN_PIXELS = """
    channel_axis = Constant <value_ints = [3]> ()
    image_axes = Constant <value_ints = [-1, 1, 1]> ()
    count_long = Size (x)
    count = Cast <to = 6> (count_long)
    image_starts = Range (nought, count, step)
    starts = Reshape (image_starts, image_axes)
    index = Add (in_image, starts)
    channels_last = Transpose <perm = [0, 2, 3, 1]> (image)
    values = Flatten <axis = 3> (channels_last)
"""

_CORNERS = """
    end = Sub (count, next)
    right_index = Add (index, next)
    below_index = Add (index, width)
    across_index = Add (right_index, width)
    right_inside = Min (right_index, end)
    below_inside = Min (below_index, end)
    across_inside = Min (across_index, end)
    x_share_flat = Sub (inside_x, left)
    y_share_flat = Sub (inside_y, top)
    x_share = Unsqueeze (x_share_flat, channel_axis)
    y_share = Unsqueeze (y_share_flat, channel_axis)
"""

_BILINEAR_IN_PLANES = """
    here_flat = GatherElements (values, index)
    right_flat = GatherElements (values, right_inside)
    below_flat = GatherElements (values, below_inside)
    across_flat = GatherElements (values, across_inside)
    here = Reshape (here_flat, shape)
    right = Reshape (right_flat, shape)
    below = Reshape (below_flat, shape)
    across = Reshape (across_flat, shape)
    upper_slope = Sub (right, here)
    upper_part = Mul (upper_slope, x_share)
    upper = Add (here, upper_part)
    lower_slope = Sub (across, below)
    lower_part = Mul (lower_slope, x_share)
    lower = Add (below, lower_part)
    slope = Sub (lower, upper)
    part = Mul (slope, y_share)
    sampled = Add (upper, part)
"""

# GatherND and Sum, where Gather and Add would do: what quantizes the graph leaves them alone, and so pixels
# are turned to float once, not once for each corner.
_BILINEAR_IN_PIXELS = """
    one = Constant <value = float {1}> ()
    here_int = Unsqueeze (index, channel_axis)
    right_int = Unsqueeze (right_inside, channel_axis)
    below_int = Unsqueeze (below_inside, channel_axis)
    across_int = Unsqueeze (across_inside, channel_axis)
    here_at = Cast <to = 7> (here_int)
    right_at = Cast <to = 7> (right_int)
    below_at = Cast <to = 7> (below_int)
    across_at = Cast <to = 7> (across_int)
    here = GatherND (values, here_at)
    right = GatherND (values, right_at)
    below = GatherND (values, below_at)
    across = GatherND (values, across_at)
    x_rest = Sub (one, x_share)
    y_rest = Sub (one, y_share)
    here_share = Mul (x_rest, y_rest)
    right_share = Mul (x_share, y_rest)
    below_share = Mul (x_rest, y_share)
    across_share = Mul (x_share, y_share)
    here_part = Mul (here, here_share)
    right_part = Mul (right, right_share)
    below_part = Mul (below, below_share)
    across_part = Mul (across, across_share)
    upper = Sum (right_part, here_part)
    three = Sum (below_part, upper)
    mixed = Sum (across_part, three)
    sampled = Transpose <perm = [0, 3, 1, 2]> (mixed)
"""

_NEAREST_IN_PLANES = """
    sampled_flat = GatherElements (values, index)
    sampled = Reshape (sampled_flat, shape)
"""


def _sampler(name: str, *parts: str) -> str:
    body = "".join(parts)
    return f'<domain: "{DOMAIN}", opset_import: ["": 18]> {name} (image, x, y) => (sampled) {{{body}}}'


_BETWEEN, _NEAREST = _PLACES.format(round="Floor"), _PLACES.format(round="Round")

# DepthToSpace(blocksize 2) of channels ordered (row, column, channel). The provider has no 8-bit
# DepthToSpace; next to channels-last convolutions the outer transposes merge, and what stays moves runs of
# bytes.
_DEPTH_TO_SPACE = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
DepthToSpace <taller, wider> (packed) => (shuffled) {{
    columns = Transpose <perm = [0, 3, 2, 1]> (packed)
    taller_shape = Constant <value_ints: ints = @taller> ()
    rows_split = Reshape (columns, taller_shape)
    rows = Transpose <perm = [0, 2, 1, 3]> (rows_split)
    wider_shape = Constant <value_ints: ints = @wider> ()
    pixels = Reshape (rows, wider_shape)
    shuffled = Transpose <perm = [0, 3, 1, 2]> (pixels)
}}
"""

# Frames (N, T, H, W, C), and the shape that they have as images (N * T, C, H, W): images of half the sides,
# with all pixels of a 2x2 block in the channels, ordered (row, column, channel).
_IN_BLOCKS = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
InBlocks <pairs> (frames, shape) => (blocks) {{
    pairs_shape = Constant <value_ints: ints = @pairs> ()
    upper = Constant <value_ints = [0]> ()
    lower = Constant <value_ints = [1]> ()
    end = Constant <value_ints = [{2**31 - 1}]> ()
    row_axis = Constant <value_ints = [2]> ()
    every_second = Constant <value_ints = [2]> ()
    four_times = Constant <value_ints = [1, 4, 1, 1]> ()
    halves = Constant <value_ints = [1, 1, 2, 2]> ()
    in_pairs = Reshape (frames, pairs_shape)
    upper_rows = Slice (in_pairs, upper, end, row_axis, every_second)
    lower_rows = Slice (in_pairs, lower, end, row_axis, every_second)
    rows = Concat <axis = 4> (upper_rows, lower_rows)
    channels_first = Transpose <perm = [0, 1, 4, 2, 3]> (rows)
    deep = Mul (shape, four_times)
    deep_and_small = Div (deep, halves)
    blocks = Reshape (channels_first, deep_and_small)
}}
"""

# The generator's last steps, a third at a time: floats of all sub-pixels, of the skip connection, the tail
# and their sum, would be what takes most memory.
_ADD_BY_COLORS = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
AddByColors (tail, frame, red_kernel, green_kernel, blue_kernel, level, zero) => (bytes) {{
    red_tail, green_tail, blue_tail = Split <axis = 1, num_outputs = 3> (tail)
    red_frame, green_frame, blue_frame = Split <axis = 1, num_outputs = 3> (frame)
    red_skip = Conv (red_frame, red_kernel)
    red = Add (red_tail, red_skip)
    red_bytes = QuantizeLinear (red, level, zero)
    green_skip = Conv (green_frame, green_kernel)
    green = Add (green_tail, green_skip)
    green_bytes = QuantizeLinear (green, level, zero)
    blue_skip = Conv (blue_frame, blue_kernel)
    blue = Add (blue_tail, blue_skip)
    blue_bytes = QuantizeLinear (blue, level, zero)
    bytes = Concat <axis = 1> (red_bytes, green_bytes, blue_bytes)
}}
"""

# Bytes of what each row of sub-pixels has, times the shares of the columns: floats of one row at a time.
_SHARE_BY_ROWS = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
ShareByRows (rows, shares, level, zero) => (bytes) {{
    first, second, third, fourth = Split <axis = 1, num_outputs = 4> (rows)
    first_shared = Mul (first, shares)
    second_shared = Mul (second, shares)
    third_shared = Mul (third, shares)
    fourth_shared = Mul (fourth, shares)
    first_bytes = QuantizeLinear (first_shared, level, zero)
    second_bytes = QuantizeLinear (second_shared, level, zero)
    third_bytes = QuantizeLinear (third_shared, level, zero)
    fourth_bytes = QuantizeLinear (fourth_shared, level, zero)
    bytes = Concat <axis = 1> (first_bytes, second_bytes, third_bytes, fourth_bytes)
}}
"""

FUNCTIONS = (
    _sampler("SamplePlanes", _BETWEEN, _IN_PLANES, _CORNERS, _BILINEAR_IN_PLANES),
    _sampler("SamplePixels", _BETWEEN, _IN_PIXELS, _CORNERS, _BILINEAR_IN_PIXELS),
    _sampler("NearestInPlanes", _NEAREST, _IN_PLANES, _NEAREST_IN_PLANES),
    _DEPTH_TO_SPACE,
    _IN_BLOCKS,
    _ADD_BY_COLORS,
    _SHARE_BY_ROWS,
)
"""``SamplePlanes`` suits few channels and ``SamplePixels`` many; ``NearestInPlanes`` takes the nearest
sample; ``DepthToSpace`` doubles the sides, ``InBlocks`` halves them; ``AddByColors`` ends the generator, and
``ShareByRows`` makes the last of flow_align."""
