package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/urfave/cli/v2"

	"mailproxy/config"
	"mailproxy/web"
)

// A queueNode is one whose queue is meant.
type queueNode struct {
	index  int // in queueNodeList.all
	cid    config.CID
	name   string
	client *web.Client
	peer   bool // it is another one
}

func (n queueNode) label() string { return clean(n.name) + "(" + strconv.Itoa(int(n.cid)) + ")" }

// A queueNodeList are those that --node and --all mean; without either this one alone, which needs no name.
type queueNodeList struct {
	all   []queueNode
	named bool

	mu   sync.Mutex
	away []error
}

// errNoSuchNode is a node that this one's daemon does not know.
var errNoSuchNode = errors.New("no such node")

// queueNodes asks the daemon which nodes there are, where that is needed: also with PostgreSQL down.
func queueNodes(c *cli.Context) (*queueNodeList, error) {
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return nil, noNodeFile(err)
	}
	want, all := c.String("node"), c.Bool("all")
	here := queueNode{client: web.Control(local.ControlSocket())}
	switch {
	case want != "" && all:
		return nil, usagef("%s: --node and --all together", commandName(c))
	case want == "" && !all:
		return &queueNodeList{all: []queueNode{here}}, nil
	}
	list, err := knownNodes(c, local, here)
	if err != nil {
		return nil, err
	}
	if !all {
		i, err := list.find(want)
		if err != nil {
			return nil, err
		}
		list.all = list.all[i : i+1]
	}
	for i := range list.all {
		list.all[i].index = i
	}
	return list, nil
}

// knownNodes gives all nodes that the daemon here knows, by CID.
func knownNodes(c *cli.Context, local *config.Local, here queueNode) (*queueNodeList, error) {
	var self struct {
		CID   config.CID `json:"cid"`
		Name  string     `json:"name"`
		Peers []struct {
			CID  config.CID `json:"cid"`
			Name string     `json:"name"`
		} `json:"peers"`
	}
	if err := here.client.Status(c.Context, &self); err != nil {
		return nil, err
	}
	here.cid, here.name = self.CID, self.Name
	list := &queueNodeList{all: []queueNode{here}, named: true}
	for _, p := range self.Peers {
		list.all = append(list.all, queueNode{cid: p.CID, name: p.Name, client: web.Peer(local.PeerControlSocket(p.CID)), peer: true})
	}
	slices.SortFunc(list.all, func(a, b queueNode) int { return int(a.cid) - int(b.cid) })
	return list, nil
}

// nodeOf gives the node of a CID, or of a name that the daemon knows.
func nodeOf(c *cli.Context, text string) (config.CID, error) {
	if n, err := strconv.ParseInt(text, 10, 32); err == nil && n > 0 {
		return config.CID(n), nil
	}
	local, err := config.LoadLocal(configFile(c))
	if err != nil {
		return 0, noNodeFile(err)
	}
	list, err := knownNodes(c, local, queueNode{client: web.Control(local.ControlSocket())})
	if err != nil {
		return 0, err
	}
	i, err := list.find(text)
	if err != nil {
		return 0, err
	}
	return list.all[i].cid, nil
}

// find gives the place of the node that a CID or name means.
func (l *queueNodeList) find(want string) (int, error) {
	i := slices.IndexFunc(l.all, func(n queueNode) bool { return strconv.Itoa(int(n.cid)) == want || strings.EqualFold(n.name, want) })
	if i < 0 {
		return 0, withHint(fmt.Errorf("%w: %s", errNoSuchNode, want), `"pmgcm status" shows them`)
	}
	return i, nil
}

// each asks all nodes side by side. Of one alone the error is given as it is; else each error is kept, and the others go on.
func (l *queueNodeList) each(ctx context.Context, ask func(context.Context, queueNode) error) error {
	if !l.named {
		return ask(ctx, l.all[0])
	}
	var asked sync.WaitGroup
	for _, n := range l.all {
		asked.Go(func() {
			err := ask(ctx, n)
			if err == nil {
				return
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			err = fmt.Errorf("%s: %w", n.label(), err)
			if n.peer && errors.Is(err, web.ErrSilent) {
				err = withHint(err, `"pmgcm status" says since when; see that its daemon runs, and that its tunnel port is open to this node`)
			}
			l.away = append(l.away, err)
		})
	}
	asked.Wait()
	return nil
}

// ended gives how a command ends of which said is what printing gave, and err what each gave.
func (l *queueNodeList) ended(said, err error) error {
	if err != nil {
		return err
	}
	if said != nil {
		return said
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.away...)
}
