package main

import (
	"errors"
	"io/fs"
	"os"

	"mailproxy/backup"
	"mailproxy/cluster"
	"mailproxy/config"
	"mailproxy/db"
	"mailproxy/queue"
	"mailproxy/spool"
	"mailproxy/web"
)

const leaseHint = `bring the other nodes back ("pmgcm status"); where they are lost for good: "pmgcm promote --force" here, then "pmgcm delete CID" each`

// carriedLeaseHint is for whoever typed a command on another node than the master.
const carriedLeaseHint = `the master is cut off from most nodes: bring it back to them; or, where most of them answer here ("pmgcm status"), "pmgcm promote" here`
const dataKeyHint = `nothing was changed; put keys/node.key back from a backup and restart the daemon; or promote a node on which "mailproxy secret list" ` +
	`says sealed; where there is none, "mailproxy secret remove" what is unreadable, and set it again`

// hintFor is hint for whoever typed a command on another node, where "here" is there; from 0 it was this one.
func hintFor(from config.CID, err error) string {
	if from != 0 && errors.Is(err, db.ErrNoLease) {
		return carriedLeaseHint
	}
	return hint(err)
}

// hint gives the command to paste after an error; empty where there is none.
func hint(err error) string {
	var own *hintError
	var usage *usageError
	switch {
	case errors.As(err, &own):
		return own.hint
	case errors.As(err, &usage):
		return "mailproxy --help"
	case errors.Is(err, web.ErrNotRunning):
		return `start it: "systemctl start mailproxy", or look why it ended: "journalctl -u mailproxy"`
	case errors.Is(err, web.ErrNoSuch):
		return `"mailproxy queue list" shows what there is`
	case errors.Is(err, queue.ErrBusy):
		return "run it again in a moment: the rest was done"
	case errors.Is(err, queue.ErrComing):
		return "wait until that has ended, then run it again: where the item is there by then, it is removed here"
	case errors.Is(err, queue.ErrOnHold):
		return `"mailproxy queue release" ends the hold`
	case errors.Is(err, queue.ErrUnanswered):
		return "it is accepted, or dropped, with the answer to its client"
	case errors.Is(err, queue.ErrNoSuch):
		return `"mailproxy queue list" shows what there is`
	case errors.Is(err, web.ErrCut):
		return `run it again: what is done already stays so`
	case errors.Is(err, errNoDatabase):
		return `is the daemon running? "pmgcm status" says what is wrong`
	case errors.Is(err, backup.ErrPassphrase):
		return "nothing was changed; try another passphrase"
	case errors.Is(err, backup.ErrNotBackup), errors.Is(err, backup.ErrDamaged):
		return "nothing was changed; take another backup, or copy this one again from where it was kept"
	case errors.Is(err, backup.ErrNewerFormat), errors.Is(err, db.ErrNewerBackup):
		return `nothing was changed; install the version that made it, or a later one ("mailproxy --version" shows this one's)`
	case errors.Is(err, backup.ErrNoIdentity):
		return "nothing was changed; leave --identity out"
	case errors.Is(err, backup.ErrNothing), errors.Is(err, backup.ErrChanging):
		return `"pmgcm status" shows what is under way; run it again when that is done`
	case errors.Is(err, errSpoolDamaged):
		return `nothing of it is delivered; look at the disk ("journalctl -k", "smartctl"), and remove from damaged/ what you have dealt with`
	case errors.Is(err, spool.ErrNoSuch):
		return `"mailproxy spool check" counts them, "mailproxy queue list" shows them`
	case errors.Is(err, errShortPassphrase):
		return "whoever gets the file can try them all: take a few words"
	case errors.Is(err, db.ErrByHand):
		return `a later commit can be gone back to; else take a text from before ("mailproxy config apply"), or a backup`
	case errors.Is(err, db.ErrNoDataKey):
		return dataKeyHint
	case errors.Is(err, db.ErrDiskFull):
		return `nothing was changed; "df -h" shows the disk that is full: make room, then run it again`
	case errors.Is(err, db.ErrInDoubt):
		return `once the database answers, "mailproxy config history" shows whether that configuration is there`
	case errors.Is(err, db.ErrDisconnected):
		return `run it again; "pmgcm status" says whether the database is there`
	case errors.Is(err, cluster.ErrNotLetIn):
		return `this node was deleted: "pmgcm leave" here, which keeps configuration, journal and mail; then, to enter again, "pmgcm join"`
	case errors.Is(err, cluster.ErrMasterAway):
		return `wait until it is back; or, where it is lost, run "pmgcm promote" on a node that is in sync`
	case errors.Is(err, cluster.ErrDaemonSilent), errors.Is(err, web.ErrSilent):
		return `it hangs, or the machine is overloaded: "systemctl restart mailproxy"`
	case errors.Is(err, cluster.ErrNoDaemon):
		return `start it: "systemctl start mailproxy", or look why it ended: "journalctl -u mailproxy"`
	case errors.Is(err, db.ErrNoLease):
		return leaseHint
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return "run it as root"
	}
	return ""
}
