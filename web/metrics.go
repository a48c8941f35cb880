package web

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"mailproxy/queue"
)

// queueCollector shows a queue's Stats as metrics.
type queueCollector struct {
	stats func() queue.Stats
	now   func() time.Time
	rows  []queueMetric
}

// queueMetric is one line of /metrics about the queue.
type queueMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(s queue.Stats, now time.Time) float64
}

// QueueCollector gives the metrics of a queue, all from one moment.
func QueueCollector(q *queue.Queue) prometheus.Collector {
	gauge := func(name, help string, value func(queue.Stats, time.Time) float64) queueMetric {
		return queueMetric{prometheus.NewDesc("mailproxy_queue_"+name, help, nil, nil), prometheus.GaugeValue, value}
	}
	counter := func(name, help string, value func(queue.Stats) uint64) queueMetric {
		return queueMetric{prometheus.NewDesc("mailproxy_queue_"+name, help, nil, nil), prometheus.CounterValue,
			func(s queue.Stats, _ time.Time) float64 { return float64(value(s)) }}
	}
	return &queueCollector{stats: q.Stats, now: time.Now, rows: []queueMetric{
		gauge("items", "Items that wait.", func(s queue.Stats, _ time.Time) float64 { return float64(s.Items) }),
		gauge("unanswered_items", "Items whose client has no answer yet.", func(s queue.Stats, _ time.Time) float64 { return float64(s.Unanswered) }),
		gauge("on_hold_items", "Items that an operator has put on hold.", func(s queue.Stats, _ time.Time) float64 { return float64(s.OnHold) }),
		gauge("kept_items", "Items that were refused, were never verified and are not tried again unless an operator orders it.",
			func(s queue.Stats, _ time.Time) float64 { return float64(s.Kept) }),
		gauge("busy_items", "Items that are being tried.", func(s queue.Stats, _ time.Time) float64 { return float64(s.Busy) }),
		gauge("size_bytes", "Octets of all items.", func(s queue.Stats, _ time.Time) float64 { return float64(s.Bytes) }),
		gauge("damaged_files", "Files of the spool that were set aside.", func(s queue.Stats, _ time.Time) float64 { return float64(s.Damaged) }),
		gauge("oldest_age_seconds", "Age of the oldest item.", func(s queue.Stats, now time.Time) float64 {
			if s.Oldest.IsZero() {
				return 0
			}
			return now.Sub(s.Oldest).Seconds()
		}),
		counter("attempts_total", "Attempts at next hops.", func(s queue.Stats) uint64 { return s.Attempts }),
		counter("sent_total", "Forward-paths delivered from the queue.", func(s queue.Stats) uint64 { return s.Sent }),
		counter("failed_total", "Forward-paths refused for good.", func(s queue.Stats) uint64 { return s.Failed }),
		counter("expired_total", "Forward-paths given up at the end of their life.", func(s queue.Stats) uint64 { return s.Expired }),
		counter("dsns_total", "DSNs made.", func(s queue.Stats) uint64 { return s.DSNs }),
		counter("untold_total", "Forward-paths given up without a DSN.", func(s queue.Stats) uint64 { return s.Untold }),
		counter("cut_attempts_total", "Attempts that a killed daemon left; each may have been delivered.",
			func(s queue.Stats) uint64 { return s.Cut }),
		counter("unanswered_attempts_total", "Attempts whose final dot was not answered; each may have been delivered.",
			func(s queue.Stats) uint64 { return s.Unsure }),
	}}
}

// Describe is part of prometheus.Collector.
func (c *queueCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, r := range c.rows {
		ch <- r.desc
	}
}

// Collect is part of prometheus.Collector.
func (c *queueCollector) Collect(ch chan<- prometheus.Metric) {
	stats, now := c.stats(), c.now()
	for _, r := range c.rows {
		ch <- prometheus.MustNewConstMetric(r.desc, r.kind, r.value(stats, now))
	}
}
