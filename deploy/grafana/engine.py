"""The panels about the engines: batching, models and memory, errors."""

from __future__ import annotations

from deploy.grafana.panel import HERE, MODEL, Panel, gpu, mean, quantile, rate, rise

BATCHING = (
    Panel(
        "Images in a forward",
        "none",
        "Images that shared a denoising forward: the mean and the 95th percentile.",
        ((mean("batch_rows"), "{{model}}"), (quantile(0.95, "batch_rows", "model, le"), "{{model}} p95")),
    ),
    Panel(
        "Passes in a forward",
        "none",
        "A guided image makes two passes, an unguided one makes one. Mean, without padding.",
        ((mean("batch_passes"), "{{model}}"),),
    ),
    Panel(
        "Device time by phase",
        "percentunit",
        "Share of the time that engines encode, denoise and decode; 100 % is one device that never pauses.",
        (
            (rate("text_encode_seconds_sum", "instance"), "{{instance}} encode"),
            (rate("denoise_step_seconds_sum", "instance"), "{{instance}} denoise"),
            (rate("vae_decode_seconds_sum", "instance"), "{{instance}} decode"),
            (rate("vae_encode_seconds_sum", "instance"), "{{instance}} encode sources"),
        ),
        stack=True,
    ),
    Panel(
        "Occupancy",
        "percentunit",
        "Passes of a forward, without padding, as a share of the widest that pays on this device. Mean by model.",
        ((mean("batch_occupancy_ratio"), "{{model}}"),),
        most=1,
    ),
    Panel(
        "Occupancy of forwards",
        "percentunit",
        "The number of forwards by their occupancy.",
        ((rise("batch_occupancy_ratio_bucket", "le"), "{{le}}"),),
        "heatmap",
    ),
    Panel(
        "Padding",
        "percentunit",
        "Passes that only fill a bucket, as a share of all passes. DETERMINISTIC pads every forward.",
        (
            (
                f"{rate('padding_passes_total', 'model')} / "
                f"({rate('padding_passes_total', 'model')} + {rate('batch_passes_sum', 'model')})",
                "{{model}}",
            ),
        ),
        most=1,
        limits=((None, "green"), (0.5, "yellow")),
    ),
    Panel(
        "Text cache",
        "percentunit",
        "Texts found in the cache, as a share of all texts that the encoders needed. TEXT_CACHE sets its memory.",
        (
            (
                f"{rate('text_cache_hits_total', 'model')} / "
                f"({rate('text_cache_hits_total', 'model')} + {rate('text_cache_misses_total', 'model')})",
                "{{model}}",
            ),
        ),
        most=1,
    ),
)

POOL = (
    Panel(
        "Models loaded",
        "none",
        "The number of replicas that have the model ready.",
        ((f"sum by (model) (instep_model_loaded{{{MODEL}}})", "{{model}}"),),
        stack=True,
    ),
    Panel(
        "Device memory by kind",
        "bytes",
        "weights, slots and text are on the device, parked is in host memory; budget is the limit for weights.",
        ((f"sum by (device, kind) (instep_device_memory_bytes{{{HERE}}})", "{{device}} {{kind}}"),),
    ),
    Panel(
        "Time of the last load",
        "s",
        "From the start of the load until the model is ready and measured.",
        ((f"max by (model) (instep_model_load_seconds{{{MODEL}}})", "{{model}}"),),
    ),
    Panel(
        "Loads",
        "none",
        "Loads that ended in this interval, by their result.",
        ((rise("model_loads_total", "model, result"), "{{model}} {{result}}"),),
        width=12,
    ),
    Panel(
        "Evictions",
        "none",
        "Parts of models that left the device in this interval, to host memory or away.",
        ((rise("model_evictions_total", "model, to"), "{{model}} to {{to}}"),),
        width=12,
    ),
    gpu("GPU utilisation", "percentunit", "DCGM_FI_DEV_GPU_UTIL / 100", 1),
    gpu("GPU memory used", "bytes", "DCGM_FI_DEV_FB_USED * 1024 * 1024"),
    gpu("GPU temperature", "celsius", "DCGM_FI_DEV_GPU_TEMP", None, (85, "red")),
    gpu("GPU power", "watt", "DCGM_FI_DEV_POWER_USAGE"),
)

ERRORS = (
    Panel(
        "Failures by reason",
        "reqps",
        "Error codes of accepted requests that failed. cancelled means that the client left.",
        ((rate("requests_failed_total", "reason"), "{{reason}}"),),
        stack=True,
    ),
    Panel(
        "Forwards out of memory",
        "none",
        "Forwards in this interval that did not fit into memory, and were split or failed.",
        ((rise("oom_total", "model"), "{{model}}"),),
        limits=((None, "green"), (1, "red")),
    ),
    Panel(
        "Engine restarts",
        "none",
        "Engine processes that were started again in this interval, and requests that began again for that.",
        (
            (rise("worker_restarts_total", "instance", HERE), "{{instance}}"),
            (rise("requests_replayed_total", "instance", HERE), "{{instance}} requests"),
        ),
        limits=((None, "green"), (1, "red")),
    ),
)
