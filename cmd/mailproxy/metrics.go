package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"mailproxy/internal/version"
	"mailproxy/smtpd"
	"mailproxy/web"
)

// collectors are what /metrics shows: the process, the build, the configuration, the queue, and SMTP where it runs.
func (d *daemon) collectors() []prometheus.Collector {
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "mailproxy_build_info", Help: "Version of the software.",
		ConstLabels: prometheus.Labels{"version": version.Version}})
	build.Set(1)
	all := []prometheus.Collector{build, web.QueueCollector(d.queue)}
	all = append(all, d.configCollectors()...)
	if d.smtpd != nil {
		all = append(all, newSMTPCollector(d.smtpd.Stats))
	}
	return all
}

func (d *daemon) configCollectors() []prometheus.Collector {
	serial := func() float64 {
		if s := d.config.loaded.Load(); s != nil {
			return float64(s.Position.Serial)
		}
		return 0
	}
	epoch := func() float64 {
		if s := d.config.loaded.Load(); s != nil {
			return float64(s.Position.Epoch.N)
		}
		return 0
	}
	refused := func() float64 {
		if d.config.refusal() != nil {
			return 1
		}
		return 0
	}
	return []prometheus.Collector{
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mailproxy_config_serial", Help: "Serial of the configuration."}, serial),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mailproxy_config_epoch", Help: "Epoch of the configuration."}, epoch),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mailproxy_config_refused",
			Help: "1 where the newest configuration is not in force because it does not compile."}, refused),
	}
}

// smtpCollector shows the SMTP server's Stats as metrics, all from one moment.
type smtpCollector struct {
	stats func() smtpd.Stats
	rows  []smtpMetric
	limit *prometheus.Desc
}

type smtpMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(smtpd.Stats) uint64
}

func newSMTPCollector(stats func() smtpd.Stats) prometheus.Collector {
	counter := func(name, help string, value func(smtpd.Stats) uint64) smtpMetric {
		return smtpMetric{prometheus.NewDesc("mailproxy_smtp_"+name, help, nil, nil), prometheus.CounterValue, value}
	}
	gauge := func(name, help string, value func(smtpd.Stats) uint64) smtpMetric {
		return smtpMetric{prometheus.NewDesc("mailproxy_smtp_"+name, help, nil, nil), prometheus.GaugeValue, value}
	}
	limit := prometheus.NewDesc("mailproxy_smtp_limited_total", "How often clients met a limit.", []string{"limit"}, nil)
	return &smtpCollector{stats: stats, limit: limit, rows: []smtpMetric{
		gauge("open_sessions", "Sessions of this moment.", func(s smtpd.Stats) uint64 { return uint64(s.Open) }),
		gauge("open_internal_sessions", "Of these, sessions from our networks.", func(s smtpd.Stats) uint64 { return uint64(s.OpenInternal) }),
		counter("sessions_total", "Sessions.", func(s smtpd.Stats) uint64 { return s.Sessions }),
		counter("refused_sessions_total", "Sessions refused over a limit, or while draining.", func(s smtpd.Stats) uint64 { return s.Refused }),
		counter("messages_total", "Messages read to their final dot.", func(s smtpd.Stats) uint64 { return s.Messages }),
		counter("delivered_messages_total", "Messages taken by a next hop in the client's transaction.",
			func(s smtpd.Stats) uint64 { return s.Delivered }),
		counter("queued_messages_total", "Messages spooled.", func(s smtpd.Stats) uint64 { return s.Queued }),
		counter("rejected_messages_total", "Messages answered 4xx or 5xx.", func(s smtpd.Stats) uint64 { return s.Rejected }),
		counter("refused_recipients_total", "Recipients answered 4xx or 5xx, but for limits.", func(s smtpd.Stats) uint64 { return s.RecipientsRefused }),
		counter("possible_duplicates_total", "Messages perhaps taken, whose client was gone before it knew, or told to come again.",
			func(s smtpd.Stats) uint64 { return s.Duplicates }),
		counter("gone_clients_total", "Transactions dropped because the client was gone.", func(s smtpd.Stats) uint64 { return s.Gone }),
		counter("cut_sessions_total", "Sessions ended for what the client sent, or for its silence.",
			func(s smtpd.Stats) uint64 { return s.Framing }),
		counter("tls_handshakes_total", "TLS handshakes.", func(s smtpd.Stats) uint64 { return s.TLS }),
		counter("failed_tls_handshakes_total", "TLS handshakes that failed.", func(s smtpd.Stats) uint64 { return s.TLSFailed }),
	}}
}

// Describe is part of prometheus.Collector.
func (c *smtpCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.limit
	for _, r := range c.rows {
		ch <- r.desc
	}
}

// Collect is part of prometheus.Collector.
func (c *smtpCollector) Collect(ch chan<- prometheus.Metric) {
	stats := c.stats()
	for name, n := range stats.Limited {
		ch <- prometheus.MustNewConstMetric(c.limit, prometheus.CounterValue, float64(n), name)
	}
	for _, r := range c.rows {
		ch <- prometheus.MustNewConstMetric(r.desc, r.kind, float64(r.value(stats)))
	}
}
