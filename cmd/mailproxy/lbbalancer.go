package main

import (
	"github.com/urfave/cli/v2"

	"mailproxy/config"
)

// haproxyText is a whole haproxy.cfg.
//
// A node is looked at every 2 s, and every half second while it does not answer: it is out after the second failure. A connection that it
// refuses meanwhile goes to another one.
const haproxyText = `# HAProxy in front of {{.Count}}: printed by "mailproxy lb haproxy" on {{.By}} at {{.Made}}.
#
#  1. On the balancer, put it in place of /etc/haproxy/haproxy.cfg, and run:
#         haproxy -c -f /etc/haproxy/haproxy.cfg && systemctl reload haproxy
#  2. On any node, say at which addresses the balancer comes to the nodes; before that they refuse its connections:
#         mailproxy setting set proxy_from BALANCER_ADDRESS,...
#  3. When nodes were added or deleted, or their addresses or ports are others, print it anew.
{{- if .Unlisted}}
#
# Without an [agent] listener in the node file, and a restart, these cannot say that they are drained or loaded: {{join .Unlisted}}.
# Drain one, and print this anew, before you take it down.
{{- end}}
{{- if .Unseen}}
#
# These did not answer, and are taken to have the ports of {{.By}}: {{join .Unseen}}.
{{- end}}

global
	log /dev/log local0
	user haproxy
	group haproxy
	stats socket /run/haproxy/admin.sock mode 660 level admin
	# All that the nodes take together.
	maxconn {{.Sessions}}

defaults
	mode tcp
	log global
	option tcplog
	option dontlognull
	option redispatch
	balance leastconn
	timeout connect 5s
	timeout check 5s
	# The nodes end what is silent for too long, before these pass.
	timeout client {{.Timeout}}
	timeout server {{.Timeout}}
	default-server check inter 2s fastinter 500ms fall 2 rise 2 agent-inter 1s weight 100
{{- range $d := .Doors}}
{{- if .Servers}}

frontend {{.Name}}
	bind :{{.Port}}
	bind :::{{.Port}} v6only
	default_backend {{.Name}}

backend {{.Name}}
{{- if .TLS}}
	default-server send-proxy-v2
{{- else if eq .Name "internal"}}
	# 554 5.7.1 is for the balancer itself, which is none of our networks.
	option tcp-check
	tcp-check expect rstring "^(220 |554 5\\.7\\.1 )"
	default-server send-proxy-v2
{{- else if .Mail}}
	option smtpchk EHLO balancer
	default-server send-proxy-v2
{{- else}}
	# /health and /metrics of one of them.
	option httpchk GET /health
{{- end}}
{{- range .Servers}}
	server {{.Name}} {{.Address}}
		{{- if and .Agent $d.Mail}} agent-check agent-port {{.Agent}}{{end}}
		{{- if .Backup}} backup{{end}}
		{{- if and .Drained (not .Agent) $d.Mail}} weight 0 # drained: print this anew when it is back
		{{- else if and .Drained $d.Mail}} # drained: its agent says so, until it is back{{end}}
{{- end}}
{{- else if .Closed}}

# No port for {{.Name}}: {{join .Closed}} listen on loopback alone.
{{- end}}
{{- end}}
`

func lbHAProxy(c *cli.Context) error { return lbBalancer(c, haproxyText) }

// nginxText is a file for nginx's stream module. nginx sends version 1 of the PROXY header.
const nginxText = `# nginx in front of {{.Count}}: printed by "mailproxy lb nginx" on {{.By}} at {{.Made}}.
#
#  1. On the balancer (Debian: packages nginx and libnginx-mod-stream), put it at /etc/nginx/mailproxy.conf, append the line
#         include /etc/nginx/mailproxy.conf;
#     to /etc/nginx/nginx.conf, and run:
#         nginx -t && systemctl reload nginx
#  2. On any node, say at which addresses the balancer comes to the nodes; before that they refuse its connections:
#         mailproxy setting set proxy_from BALANCER_ADDRESS,...
#  3. nginx does not ask the nodes how they are. When one was drained or put back, when nodes were added or deleted, or their addresses
#     or ports are others, print it anew.
{{- if .Unseen}}
#
# These did not answer, and are taken to have the ports of {{.By}}: {{join .Unseen}}.
{{- end}}

stream {
{{- range $i, $d := .Doors}}
{{- if .Servers}}
{{if $i}}
{{end}}	upstream mailproxy_{{.Name}} {
		zone mailproxy_{{.Name}} 64k;
		least_conn;
{{- range .Servers}}
		server {{.Address}}
			{{- if .Drained}} down; # {{.Name}}, drained
			{{- else if .Backup}} backup max_fails=1 fail_timeout=5s; # {{.Name}}
			{{- else}} max_fails=1 fail_timeout=5s; # {{.Name}}{{end}}
{{- end}}
	}
	server {
		listen {{.Port}};
		listen [::]:{{.Port}};
		proxy_pass mailproxy_{{.Name}};
{{- if .Mail}}
		proxy_protocol on;
{{- end}}
		proxy_connect_timeout 5s;
		# The nodes end what is silent for too long, before this passes.
		proxy_timeout {{$.Timeout}};
	}
{{- else if .Closed}}
{{if $i}}
{{end}}	# No port for {{.Name}}: {{join .Closed}} listen on loopback alone.
{{- end}}
{{- end}}
}
`

func lbNginx(c *cli.Context) error { return lbBalancer(c, nginxText) }

func lbBalancer(c *cli.Context, text string) error {
	return withCluster(c, func(_ *config.Local, l *lbCluster) error {
		if err := l.needMail(); err != nil {
			return err
		}
		return lbPrint(c.App.Writer, text, l)
	})
}
