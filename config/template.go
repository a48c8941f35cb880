package config

import (
	"bytes"
	"fmt"
	"strings"
)

// Text gives the node file with comments, as `mailproxy init` writes it; ParseLocal reads it back.
func (l *Local) Text() []byte {
	var b bytes.Buffer
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# This node's own file: what is not replicated. Everything else is in the database, see mailproxy(8).")
	line("# An unknown key is an error. Restart the daemon after a change.")
	line("")
	line("# The node's host name, as EHLO and `pmgcm status` show it.")
	line("name = %s", quote(l.Name))
	line("# Where the other nodes reach this one: an IP address or host name, without a port.")
	line("address = %s", quote(l.Address))
	line("# Whom the daemon becomes, if root starts it, once its listeners are open. PostgreSQL never runs as root.")
	line("user = %s", quote(l.User))
	line("# What must not be lost: keys, spool, database, last configuration.")
	line("state_dir = %s", quote(l.StateDir))
	line("# Sockets.")
	line("run_dir = %s", quote(l.RunDir))
	line("# What runs here: smtp takes mail, web answers /health and /metrics. A node without smtp is a full member of the cluster.")
	line("services = %s", list(l.Services))
	line("")
	line("[smtp]")
	line("# Takes mail from the Internet to our domains: host:port of each listener; without a host, all addresses of this machine.")
	line("# TLS offers what `mailproxy tls` says; without it, tls/smtp.pem below state_dir, where one that is self-signed is made.")
	line("listen = %s", list(l.SMTP.Listen))
	line("# The same with TLS from the first octet on.")
	optionalList(&b, "tls_listen", l.SMTP.TLSListen, ":465")
	line("")
	line("[internal]")
	line("# Takes mail from our networks (`mailproxy network list`) to anywhere, and from nobody else. Without a listener here, [smtp] takes")
	line("# their mail too.")
	optionalList(&b, "listen", l.Internal.Listen, ":26")
	optionalList(&b, "tls_listen", l.Internal.TLSListen, ":465")
	line("")
	line("[web]")
	line("listen = %s", list(l.Web.Listen))
	line("")
	line("[agent]")
	line("# Where HAProxy's agent-check may ask: one line says ready, drain or down, and how much more mail this node can take. Nobody need prove")
	line("# who they are, so let the balancers alone reach it.")
	optionalList(&b, "listen", l.Agent.Listen, ":8026")
	line("")
	line("[tunnel]")
	line("# The cluster's own traffic (SSH). The other nodes must be able to reach the first one of these at the address above.")
	line("listen = %s", list(l.Tunnel.Listen))
	line("")
	line("[database]")
	line("# Without a dsn, the daemon makes and runs a PostgreSQL of its own below state_dir. With one, a server of yours, or several that fail over:")
	line("# of the hosts in it the one that can be written is taken. pool_max_conns (24: four, and one for each slave that is pushed to at the same")
	line("# time) and pgx's other pool_ settings may stand in it.")
	optional(&b, "dsn", l.Database.DSN, "host=db1,db2 port=5432,5432 dbname=mailproxy user=mailproxy target_session_attrs=read-write")
	line("# The directory of PostgreSQL's programs; without it, the newest that Debian has installed.")
	optional(&b, "bin", l.Database.Bin, "/usr/lib/postgresql/15/bin")
	return b.Bytes()
}

// optional writes a key, or an example of it as a comment.
func optional(b *bytes.Buffer, key, value, example string) {
	if value == "" {
		fmt.Fprintf(b, "#%s = %s\n", key, quote(example))
		return
	}
	fmt.Fprintf(b, "%s = %s\n", key, quote(value))
}

// optionalList is optional for a list of one example.
func optionalList(b *bytes.Buffer, key string, values []string, example string) {
	if len(values) == 0 {
		fmt.Fprintf(b, "#%s = %s\n", key, list([]string{example}))
		return
	}
	fmt.Fprintf(b, "%s = %s\n", key, list(values))
}

func list(values []string) string {
	quoted := make([]string, len(values))
	for i, v := range values {
		quoted[i] = quote(v)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
