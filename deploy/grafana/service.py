"""The panels that a user of the service would ask for: is it up, how much, how fast, how long is the queue.

Knows nothing of how a panel looks.
"""

from __future__ import annotations

from deploy.grafana.panel import HERE, LATELY, MODEL, Panel, rate, stage, stat

OVERVIEW = (
    stat(
        "Ready",
        "none",
        "What /readyz says: an engine lives and what PRELOAD names is loaded. The worst of the replicas.",
        f"min(instep_ready{{{HERE}}})",
        (None, "red"),
        (1, "green"),
        words=(("0", "no"), ("1", "yes")),
    ),
    stat(
        "Engines",
        "none",
        "Engine processes that are able to work, one for each device.",
        f"sum(instep_workers_live{{{HERE}}})",
        (None, "red"),
        (1, "green"),
    ),
    stat(
        "Images",
        "suffix: /s",
        "Images answered a second.",
        f"sum(rate(instep_images_total{{{MODEL}}}{LATELY}))",
    ),
    stat(
        "Latency, p95",
        "s",
        "From the request to its encoded images, the last 5 minutes. The worst of the replicas.",
        f"max(instance:instep_latency_seconds:p95_5m{{{HERE}}} >= 0)",
        (None, "green"),
        (30, "yellow"),
        (60, "red"),
    ),
    stat(
        "Queue",
        "s",
        "Device time ahead of a new request, on the fullest device. Scale by this; from MAX_WAIT (120 s) on: 503.",
        f"max(instance:instep_queue_device_seconds:max{{{HERE}}})",
        (None, "green"),
        (30, "yellow"),
        (60, "red"),
    ),
    stat(
        "Failed",
        "percentunit",
        "Of the accepted requests that their clients did not give up, the last 5 minutes. The worst of the replicas.",
        f"max(instance:instep_failed_requests:ratio_rate5m{{{HERE}}} >= 0)",
        (None, "green"),
        (0.005, "yellow"),
        (0.02, "red"),
    ),
    stat(
        "Refused",
        "percentunit",
        "Of all requests, those refused for want of room (429, 503, 507), the last 5 minutes. The worst replica.",
        f"max(instance:instep_refused_requests:ratio_rate5m{{{HERE}}} >= 0)",
        (None, "green"),
        (0.01, "yellow"),
        (0.05, "red"),
    ),
    stat(
        "Occupancy",
        "percentunit",
        "Passes of a denoising forward over the most that pay on this device.",
        f"sum(rate(instep_batch_occupancy_ratio_sum{{{MODEL}}}{LATELY})) / "
        f"sum(rate(instep_batch_occupancy_ratio_count{{{MODEL}}}{LATELY}))",
    ),
)

TRAFFIC = (
    Panel(
        "Images answered", "suffix: /s", "Images a second.", ((rate("images_total", "model"), "{{model}}"),), stack=True
    ),
    Panel(
        "Requests by outcome",
        "reqps",
        "answered; failed after they were accepted; cancelled by their clients; refused at the door.",
        ((rate("requests_total", "outcome"), "{{outcome}}"),),
        stack=True,
    ),
    Panel(
        "Images in flight",
        "none",
        "running: in the last batch. waiting: accepted, not yet answered and not in a batch.",
        (
            (f"sum(instep_num_requests_running{{{MODEL}}})", "running"),
            (f"sum(instep_num_requests_waiting{{{MODEL}}})", "waiting"),
        ),
        stack=True,
    ),
)

LATENCY = (
    stage("Whole request", "e2e_request_latency_seconds", "From the request to its encoded images."),
    stage("Queue", "request_queue_time_seconds", "From acceptance to the first step of an image, less its encode."),
    stage("Text encoding", "text_encode_seconds", "One forward of the text encoders or label embeddings."),
    stage("Denoising step", "denoise_step_seconds", "One forward of the network with its update. An image takes many."),
    stage("Image decoding", "vae_decode_seconds", "One forward of the VAE."),
    stage("Image encoding", "image_encode_seconds", "PNG, JPEG or WebP of one request, off the event loop."),
)

QUEUE = (
    Panel(
        "Images waiting",
        "none",
        "Accepted, not yet answered and not in a batch.",
        ((f"sum by (model) (instep_num_requests_waiting{{{MODEL}}})", "{{model}}"),),
        stack=True,
    ),
    Panel(
        "Device seconds queued",
        "s",
        "Estimated device time of what is not yet answered, by worker. The signal to scale by.",
        ((f"instep_queue_device_seconds{{{HERE}}}", "{{instance}} worker {{worker}}"),),
        limits=((None, "green"), (60, "red")),
    ),
    Panel(
        "Refusals by reason",
        "reqps",
        "Error codes of refused requests. overloaded, no_worker and the like want room; the rest is the client's own.",
        ((rate("requests_rejected_total", "reason"), "{{reason}}"),),
        stack=True,
    ),
)

FRONT = (
    Panel(
        "Front: memory",
        "bytes",
        "Resident memory of the process that speaks HTTP; engines are processes of their own.",
        ((f'process_resident_memory_bytes{{job="instep", {HERE}}}', "{{instance}}"),),
    ),
    Panel(
        "Front: processor",
        "percentunit",
        "100 % is one core. Near that, every answer is late.",
        ((f'rate(process_cpu_seconds_total{{job="instep", {HERE}}}{LATELY})', "{{instance}}"),),
        limits=((None, "green"), (0.9, "red")),
    ),
    Panel(
        "Front: time of a scrape",
        "s",
        "The front writes /metrics in a thread: a slow scrape is a front with too little processor time.",
        ((f'scrape_duration_seconds{{job="instep", {HERE}}}', "{{instance}}"),),
        limits=((None, "green"), (1, "red")),
    ),
)
